"""The run folder and what each process writes into it."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from beit3_dist.checkpoint.files import write_text
from beit3_dist.command_line import to_yaml
from beit3_dist.config import JobConfig
from beit3_dist.data.faults import Fault
from beit3_dist.gathering import gather_objects
from beit3_dist.opening import read_text
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.computing import computed_by
from beit3_dist.run.records import JsonLines, Reporter, aside
from beit3_dist.trackers.base import Recorded
from beit3_dist.trackers.trackers import Trackers

Entry = TypeVar("Entry")

log = logging.getLogger(__name__)


class _Log(logging.FileHandler):
    """Loses what its disk does not take: the files of records say once that the disk is full."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Nothing more."""


class RunFolder:
    """OUT: config.yaml and those of all stretches, metrics.jsonl, eval.jsonl, quarantine.jsonl, skipped.jsonl,
    logs/rank*.log, and what the config's trackers write, such as tensorboard/.

    Records after `step` (of a run that was killed and goes on after `step`) are moved aside. The first process writes
    everything but the other processes' logs.
    """

    def __init__(
        self, out: Path, config: JobConfig, mesh: Mesh, step: int, sources: Mapping[str, Any] | None = None
    ) -> None:
        """`sources`: what the run's data and tokenizers are known again by. Raises ValueError for a tracker that cannot
        begin."""
        self.folder = out
        """OUT."""
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.log_file = out / "logs" / f"rank{mesh.rank:05d}.log"
        self._log = handler = _Log(self.log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        logging.getLogger("beit3_dist").setLevel(logging.INFO)
        log.info("rank %d of %d on %s, %d steps done", mesh.rank, mesh.world, mesh.device, step)
        self._computes = computed_by(config, mesh.device)
        log.info("computed by %s", self._computes)
        self._reporter = None
        if mesh.is_first:
            recipe = to_yaml(config)
            hashes = {"config": hashlib.sha256(recipe.encode()).hexdigest(), **(sources or {})}
            trackers = Trackers(config.trackers, Recorded(out, step, asdict(config), recipe, hashes))
            self._reporter = Reporter(out, step, config.steps, trackers)
            self._reporter.text(step, "computes", self._computes)
            # A run that starts anew writes the faults of its step 0, what the data had to leave out, again.
            last = step or -1
            self._quarantine, self._skipped = (
                JsonLines(out / name, last) for name in ("quarantine.jsonl", "skipped.jsonl")
            )
            keep_config(out, recipe, step)  # and puts the names of the files above on the disk

    def step(self, record: Mapping[str, Any]) -> None:
        if self._reporter:
            self._reporter.step({**record, "computes": self._computes})

    def evaluation(self, record: Mapping[str, Any]) -> None:
        if self._reporter:
            self._reporter.evaluation(record)

    def times(self, record: Mapping[str, float]) -> None:
        """What a step's time went to, for the trackers."""
        if self._reporter:
            self._reporter.times(record)

    def image(self, step: int, name: str, image: Tensor) -> None:
        """An image, uint8 [3, H, W], for the trackers."""
        if self._reporter:
            self._reporter.image(step, name, image)

    def shown(self, step: int, images: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
        """Images and texts by name, for the trackers."""
        if self._reporter:
            for name, image in images.items():
                self._reporter.image(step, name, image)
            for name, text in texts.items():
                self._reporter.text(step, name, text)

    def quarantine(self, step: int, faults: list[Fault]) -> None:
        """One line for each sample that was replaced."""
        if self._reporter:
            for fault in faults:
                self._quarantine.write({"step": step, **asdict(fault)})

    def skipped(self, step: int, sample_ids: list[Mapping[str, list[int]]]) -> None:
        """Lines for a step that was skipped: each replica's samples by stream."""
        if self._reporter:
            for ids in sample_ids:
                self._skipped.write({"step": step, **ids})

    def sync(self) -> None:
        """Returns when the records so far are on the disk. Before a checkpoint: a run that goes on from it never writes
        them again."""
        if self._reporter:
            for file in (self._reporter, self._quarantine, self._skipped):
                file.sync()

    def close(self) -> None:
        if self._reporter:
            self.sync()
            self._reporter.close()
        logging.getLogger().removeHandler(self._log)
        self._log.close()


def keep_config(out: Path, recipe: str, step: int) -> None:
    """Writes config.yaml, and as config_step_NNNNNNN.yaml the recipe of the stretch that begins after `step`. Recipes
    of later stretches, before which the run has gone back, are moved aside."""
    for path in out.glob("config_step_*.yaml"):
        begun = re.fullmatch(r"config_step_(\d+)\.yaml", path.name)
        if begun and (int(begun[1]) > step or int(begun[1]) == step and read_text(path) != recipe):
            path.rename(aside(path))
    for name in (f"config_step_{step:07d}.yaml", "config.yaml"):
        write_text(out / name, recipe)


def of_all(mine: list[Entry], group: dist.ProcessGroup | None) -> list[Entry]:
    """The items of all processes of a group (None: of the run), one process after the other. Collective.

    Files are written by the first process alone: not every file system appends the lines of several in one piece.
    """
    return [item for some in gather_objects(mine, group) for item in some]
