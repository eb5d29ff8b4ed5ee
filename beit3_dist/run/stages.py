"""Runs in stages: all are checked before the first one begins; see run/stage_file.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3_dist.checkpoint.find import find, read_state
from beit3_dist.config import RunConfig, require, require_laid_out
from beit3_dist.looking import of_run
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.preflight import Ready, prepare_run
from beit3_dist.run.preflight_finetuning import FinetuneReady, prepare_finetuning
from beit3_dist.run.stage_file import Stage
from beit3_dist.tasks.config import FinetuneConfig

log = logging.getLogger(__name__)

StageConfig = RunConfig | FinetuneConfig


@dataclass(frozen=True)
class ReadyStages:
    """What is left to do."""

    stages: list[Stage]
    """From the first one that is not done."""
    first: Ready | FinetuneReady | None
    """The first of them, opened; None: all are done."""
    mesh_of: Callable[[StageConfig], Mesh]


def prepare_stages(stages: Sequence[Stage], mesh_of: Callable[[StageConfig], Mesh]) -> ReadyStages:
    """Checks all stages that are left, and opens the first of them. Raises ValueError with one line that names the
    stage and the field."""
    left = list(stages)
    while left and _is_done(left[0].config):
        log.info("stage %s is done", left[0].name)
        del left[0]
    first, before = None, None
    for stage in left:
        try:
            config = stage.config
            require_laid_out(config)
            if before is not None:
                _check_not_begun(config)
            ready = opened(config, mesh_of(config), before)
        except (ValueError, OSError) as error:
            raise ValueError(f"stage {stage.name}: {error}") from None
        first, before = first or ready, config
    return ReadyStages(left, first, mesh_of)


def opened(config: StageConfig, mesh: Mesh, before: StageConfig | None = None) -> Ready | FinetuneReady:
    """A stage, checked and opened: `prepare_run`, or `prepare_finetuning`."""
    if isinstance(config, FinetuneConfig):
        return prepare_finetuning(config, mesh, before)
    if isinstance(before, FinetuneConfig):
        raise ValueError("the stage before is a fine-tuning, and none is pretrained from: put it behind")
    return prepare_run(config, mesh, before)


def _is_done(config: StageConfig) -> bool:
    """Whether a run that goes on has nothing left to do."""
    if config.checkpoint.resume != "auto":
        return False

    def look() -> bool:
        checkpoint = find("auto", Path(config.out) / "checkpoints")
        if isinstance(config, FinetuneConfig):  # whose epochs are steps only when its examples are known
            return checkpoint is not None and (Path(config.out) / "model").is_dir()
        return checkpoint is not None and read_state(checkpoint, config.model).step >= config.steps

    return of_run(look)


def _check_not_begun(config: StageConfig) -> None:
    of_run(lambda: _require_nothing_begun(config))


def _require_nothing_begun(config: StageConfig) -> None:
    begun = find("auto", Path(config.out) / "checkpoints")
    require(
        begun is None, f"{begun} was made before the stage before it was done: move {config.out} away to begin it anew"
    )
