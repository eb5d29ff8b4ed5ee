"""A pretraining run's folder, opened to be reported: its records, its newest checkpoint, its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from beit3_dist.checkpoint.find import find, read_state
from beit3_dist.config import STREAMS, BatchConfig, RunConfig, require
from beit3_dist.data.batch import MixedBatches
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import tokenizer_view_size
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import Objectives
from beit3_dist.reports.history import Followed
from beit3_dist.run.recorded_config import pretraining_config

SAMPLES_AT_ONCE = 32
"""Of each stream. A sample does not depend on its batch, so this bounds the memory and changes nothing else."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder and what its config names, opened and checked."""

    folder: Path
    config: RunConfig
    checkpoint: Path
    step: int
    objectives: Objectives
    image_tokenizer: VQKD | None
    """None: no objective has visual codes."""
    train: MixedBatches
    """The training streams, `SAMPLES_AT_ONCE` samples of each at once."""
    shown: MixedBatches
    """The held-out streams, or the training streams of a run that names no held-out shards; one sample at once."""

    @cached_property
    def metrics(self) -> list[Record]:
        """Of all steps. Raises ValueError where there is none."""
        records = read_records(self.folder / "metrics.jsonl")
        require(bool(records), f"{self.folder} has no metrics.jsonl with a step in it: the run has not trained yet")
        return records

    @cached_property
    def evaluations(self) -> list[Record]:
        """Of all validations."""
        return read_records(self.folder / "eval.jsonl")


def open_run(folder: Path, program: str, plugins: Sequence[str] = ()) -> Run:
    """Raises ValueError or OSError with one line where something is missing or does not fit, or the config is one that
    this version refuses. `program`: who asks."""
    config = pretraining_config(folder, program, plugins)
    checkpoint = find("auto", folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{folder / 'checkpoints'} holds no checkpoint yet: wait for step {config.checkpoint.every}")
    state = read_state(checkpoint, config.model)
    objectives, image_tokenizer, view_size = objectives_of(config), None, config.model.image_size
    if objectives.coded:
        image_tokenizer = load_vqkd(config.image_tokenizer)
        view_size = tokenizer_view_size(image_tokenizer, config.image_tokenizer, config.model)
    there = [name for name in STREAMS if getattr(config.batch, name)]
    has_held_out = all(getattr(config.eval, name) for name in there)

    def streams(at_once: int, held_out: bool) -> MixedBatches:
        # Nothing is trained here: a validation of the whole batch is none of this config's concern.
        batch = BatchConfig(**{name: at_once * (name in there) for name in STREAMS})
        return MixedBatches(replace(config, batch=batch), view_size, 0, 1, held_out, [*objectives])

    train, shown = streams(SAMPLES_AT_ONCE, held_out=False), streams(1, has_held_out)
    return Run(folder, config, checkpoint, state.step, objectives, image_tokenizer, train, shown)


def read_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file, none if there is no file. A last line that a crash cut short is left out."""
    return [*Followed(path).new()]


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """float64 [records]; a number that was not finite, null in the file, is NaN, as is one that was not told yet, and
    that of a data set of which a step has no sample."""
    return np.array([record.get(name) for record in records], dtype=np.float64)
