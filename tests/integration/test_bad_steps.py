"""Steps that are not finite: skipped, named, and the same after a resumption; too many of them end the run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_dist.checkpoint.find import read_state
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.config import CheckpointConfig, GuardConfig, ParallelConfig, RunConfig
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from tests.integration.runs import metrics, reproducible, run_config, train
from tests.parallel.workers import run_workers


def train_badly(groups: Groups, config: RunConfig, bad_steps: list[int]) -> str:
    """A run in which the last rank's loss is NaN in the steps of these numbers (1, 2, ...)."""
    now = {"step": 0}
    step_of, losses_of = Engine.train_step, MaskedDataModeling.losses

    def train_step(engine: Engine, micro_batches: Any, counts: Tensor, step: int, lr: float) -> Any:
        now["step"] = step + 1
        return step_of(engine, micro_batches, counts, step, lr)

    def losses(self: MaskedDataModeling, *arguments: Any) -> tuple[Tensor, Tensor]:
        contribution, statistics = losses_of(self, *arguments)
        if now["step"] in bad_steps and groups.mesh.rank == groups.mesh.world - 1:
            return contribution * float("nan"), statistics * float("nan")
        return contribution, statistics

    Engine.train_step, MaskedDataModeling.losses = train_step, losses  # type: ignore[method-assign]
    return train(groups, config)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_skipped_steps_and_resumption(zero_stage: int, tmp_path: Path) -> None:
    """The first two steps are bad too, so that the first checkpoint is one of an optimizer that never stepped."""
    bad = [1, 2, 5, 6]
    config = run_config(tmp_path, steps=8, parallel=ParallelConfig(zero_stage=zero_stage),
                        checkpoint=CheckpointConfig(every=2, keep=0))  # fmt: skip
    assert run_workers(2, train_badly, config, bad) == ["", ""]
    records, out = metrics(config.out), Path(config.out)
    assert [r["step"] for r in records if r["skipped"]] == bad
    assert all((r["loss"] is None and r["grad_norm"] is None) == bool(r["skipped"]) for r in records)
    assert read_state(out / "checkpoints" / "step_0000008", config.model).skipped_steps == 4

    named = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in named) == sorted(bad * 2)  # a line of each rank
    assert all(len(line[stream]) == 2 for line in named for stream in ("images", "texts", "pairs"))
    initial, after_two = (read_weights(out / "checkpoints" / f"step_{step:07d}") for step in (8, 2))
    assert any(not torch.equal(initial[name], weight) for name, weight in after_two.items()), "nothing was trained"

    for start in (2, 6):
        resume = CheckpointConfig(every=2, keep=0, resume=str(out / "checkpoints" / f"step_{start:07d}"))
        other = replace(config, out=str(tmp_path / f"from-{start}"), checkpoint=resume)
        assert run_workers(2, train_badly, other, bad) == ["", ""]
        assert reproducible(other.out) == reproducible(config.out)[start:]
        ours, reference = (read_weights(Path(o, "checkpoints", "step_0000008")) for o in (other.out, config.out))
        assert all(torch.equal(ours[name], weight) for name, weight in reference.items())


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    config = run_config(tmp_path, checkpoint=CheckpointConfig(every=2), guards=GuardConfig(max_skipped_steps=3))
    errors = run_workers(2, train_badly, config, [2, 3, 5, 6, 7, 8])
    assert len(metrics(config.out)) == 7, "two in a row must not end it, and three must"
    for error in errors:
        assert all(part in error for part in ("guards.max_skipped_steps=3", "step 7", "skipped.jsonl")), error
        # The one of step 6 may still be on its way.
        assert re.search(rf"last good checkpoint is {config.out}/checkpoints/step_000000[46]:", error), error
