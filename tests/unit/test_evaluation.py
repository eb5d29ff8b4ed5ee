"""Validation reads the same samples by loader processes as in the training process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_dist.config import BatchConfig, EvalConfig, RunConfig
from beit3_dist.data.batch import MicroBatch, MixedBatches, Request
from beit3_dist.data.faults import Fault
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.train import validation as evaluation
from beit3_dist.train.feed import StepBatch
from beit3_dist.train.totals import Totals
from tests.unit.tar_fixtures import small_run


class Signed(MixedBatches):
    """Micro-batches that tell the process that read them."""

    def __getitem__(self, request: Request) -> MicroBatch:
        return replace(super().__getitem__(request), faults=[Fault("", "", str(os.getpid()), "")])


class Watching:
    """Stands for the engine and the feed; keeps what it was given."""

    def __init__(self, reads: bool = True) -> None:
        self.mesh = SimpleNamespace(device=torch.device("cpu"))
        self.reads = reads
        self.steps: list[list[MicroBatch]] = []

    def step(self, read: Callable[[], list[MicroBatch]], together: Any) -> StepBatch:
        self.steps.append(read() if self.reads else [])
        return StepBatch(self.steps[-1], Totals([1] * 4, 1, 1, 1, 1).pack(), torch.zeros(()))

    def evaluate(self, micro_batches: Iterable[Any]) -> SimpleNamespace:
        return SimpleNamespace(losses=[float(len(list(micro_batches)))] * 4, correct=[0.0] * 4)


def validated(config: RunConfig, watching: Watching) -> list[list[MicroBatch]]:
    objectives = objectives_of(config)
    held_out = Signed(config, 32, 0, 1, held_out=True, annotators=[*objectives])
    engine: Any = watching
    scores = evaluation.evaluate(config, objectives, engine, engine, held_out, None, None, None)
    assert scores["loss_text"] == sum(map(len, watching.steps)) / config.eval.batches
    return watching.steps


def test_loader_processes_read_what_the_trainer_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3_dist.train.passes.prepared", lambda _, batch, *more: (batch, None, None))
    run = small_run(tmp_path, batch=BatchConfig(images=4, texts=4, pairs=4, accumulation=2))
    shards = {name: getattr(run.data, name) for name in ("images", "texts", "pairs")}
    run = replace(run, eval=EvalConfig(every=1, batches=3, **shards))
    steps = {
        workers: validated(replace(run, data=replace(run.data, workers=workers)), Watching()) for workers in (0, 2)
    }
    for alone, loaded in zip(*steps.values(), strict=True):
        assert len(alone) == len(loaded) == 2
        for ours, theirs in zip(alone, loaded, strict=True):
            for name, samples in ours.streams.items():
                assert torch.equal(samples.ids, theirs.streams[name].ids)
            assert torch.equal(ours.streams["images"].images, theirs.streams["images"].images)
            assert torch.equal(ours.streams["texts"].text, theirs.streams["texts"].text)
    readers = {workers: {b.faults[0].key for step in found for b in step} for workers, found in steps.items()}
    assert readers[0] == {str(os.getpid())} and len(readers[2]) == 2 and not readers[2] & readers[0]
    assert validated(run, Watching(reads=False)) == [[]] * 3
