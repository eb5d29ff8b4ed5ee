"""A run that changes its layout again and again takes the steps of the run that never did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import BatchConfig, CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.endings import Preempted
from beit3_dist.run.guards import Guards
from tests.equality import assert_close
from tests.integration.runs import metrics, run_config, train
from tests.parallel.workers import run_workers

LAYOUTS = [  # processes and layout of two steps each, after two of two replicas under ZeRO-3
    (4, ParallelConfig(zero_stage=1, tensor=2, pipeline=2)),
    (4, ParallelConfig(zero_stage=3)),
    (1, ParallelConfig(zero_stage=0)),
    (2, ParallelConfig(zero_stage=1, tensor=2, sequence=True)),
    (4, ParallelConfig(zero_stage=3, tensor=2, pipeline=2)),
    (2, ParallelConfig(zero_stage=2)),
]
STEPS = 2 + 2 * len(LAYOUTS)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "paper": {"attention": "shared", "sub_layernorm": False, "vl_expert_layers": 1},
    "released": {"attention": "per_modality", "sub_layernorm": True, "vl_expert_layers": 0},
    "tower": {"ffn": "shared", "vl_expert_layers": 0},
    "fusion": {
        "layers": 4,
        "attention": "per_modality",
        "vl_expert_layers": 0,
        "fusion_layers": 2,
        "connected_every": 1,
    },
}


def train_until(groups: Groups, config: RunConfig, last: int) -> str:
    """`train`, asked to go after a step as by a machine that is taken away."""

    def asked_after(guards: Guards, state: TrainState, *_: Any) -> None:
        guards._request._asked = state.step == last

    Guards.check_step = asked_after  # type: ignore[method-assign]
    try:
        return train(groups, config)
    except Preempted as stop:
        return str(stop)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_goes_on_in_other_layouts(architecture: str, tmp_path: Path) -> None:
    """dp2 -> tp2pp2 -> dp4 -> one process -> tp2 -> tp2pp2 -> dp2, ZeRO 3 -> 1 -> 3 -> 0 -> 1 -> 3 -> 2.

    Every loss and gradient norm stays within the noise of fp32 of the run in one layout, though each run goes on from
    the weights and moments of the one before.
    """
    config = run_config(tmp_path)
    config = replace(config, steps=STEPS, batch=BatchConfig(images=8, texts=8, pairs=8, accumulation=2),
                     model=replace(config.model, **ARCHITECTURES[architecture]))  # fmt: skip
    whole = replace(config, out=str(tmp_path / "whole"), checkpoint=CheckpointConfig(every=2, keep=0))
    assert run_workers(2, train, whole) == ["", ""]
    reference = metrics(whole.out)
    out, step = tmp_path / "whole", 2
    for number, (world, parallel) in enumerate(LAYOUTS):
        source = out / "checkpoints" / f"step_{step:07d}"
        out, step = tmp_path / f"changed-{number}", step + 2
        settings = CheckpointConfig(every=2, resume=str(source))
        parallel = replace(parallel, sequence=parallel.sequence and architecture != "fusion")  # which refuses it
        changed = replace(config, out=str(out), parallel=parallel, checkpoint=settings)
        answers = run_workers(world, train_until, changed, step, tensor=parallel.tensor, pipeline=parallel.pipeline)
        assert set(answers) == {"" if step == STEPS else f"asked to go: saved after step {step} of {STEPS}"}
        ours, expected = metrics(out), reference[step - 2 : step]
        assert [record["sample_hash"] for record in ours] == [record["sample_hash"] for record in expected]
        for name in ("loss", "loss_image", "loss_text", "loss_pair_image", "loss_pair_text", "grad_norm"):
            values = (torch.tensor([record[name] for record in records]) for records in (ours, expected))
            assert_close(*values, f"{name} in {parallel}")
