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
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from tests.integration.runs import metrics, reproducible, run_config, train
from tests.parallel.workers import run_workers


def train_badly(groups: Groups, config: RunConfig, bad_steps: list[int]) -> str:
    """A run in which the last rank's loss is NaN in the steps of these numbers (1, 2, ...)."""
    now = {"step": 0}
    step_of, losses_of = Engine.train_step, PretrainingModule.losses

    def train_step(engine: Engine, micro_batches: Any, counts: Tensor, step: int, lr: float) -> Any:
        now["step"] = step + 1
        return step_of(engine, micro_batches, counts, step, lr)

    def losses(self: PretrainingModule, *arguments: Any) -> tuple[Tensor, Tensor]:
        contribution, statistics = losses_of(self, *arguments)
        if now["step"] in bad_steps and groups.mesh.rank == groups.mesh.world - 1:
            return contribution * float("nan"), statistics * float("nan")
        return contribution, statistics

    Engine.train_step, PretrainingModule.losses = train_step, losses  # type: ignore[method-assign]
    return train(groups, config)


@pytest.mark.slow
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
        # That of step 4 holds weights that no finite step has met.
        assert f"last good checkpoint is {config.out}/checkpoints/step_0000002:" in error, error


@pytest.mark.slow
def test_the_report_names_a_checkpoint_from_which_training_goes_on(tmp_path: Path) -> None:
    """A much too high rate destroys the weights in step 5, so that all later steps are skipped: the checkpoints of 6
    and 8 hold what is left of them, and the good one stays, although one is kept."""
    guards = GuardConfig(max_skipped_steps=4)
    config = run_config(tmp_path, steps=4, guards=guards, checkpoint=CheckpointConfig(every=2, keep=1, resume="auto"))
    assert run_workers(1, train, config) == [""]
    too_fast = replace(config, steps=12, optim=replace(config.optim, lr=1e9, warmup_steps=0))
    (error,) = run_workers(1, train, too_fast)
    assert "so many steps in a row, the last of them step 9" in error, error
    folder = Path(config.out, "checkpoints")
    assert [path.name[-1] for path in sorted(folder.glob("step_*"))] == ["4", "6", "8"]
    named = re.findall("last good checkpoint is ([^:]*):", error)
    assert named == [f"{folder}/step_0000004"]
    resume = CheckpointConfig(every=2, keep=1, resume=named[0])
    assert run_workers(1, train, replace(config, steps=12, checkpoint=resume)) == [""]
    assert not any(record["skipped"] for record in metrics(config.out))
    assert [path.name[-2:] for path in sorted(folder.glob("step_*"))] == ["10", "12"]
