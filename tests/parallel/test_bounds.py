"""A parameter that a step leaves outside its interval is put back, on every rank, in masters and working weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.fragments import fragments
from beit3_dist.parallel.mesh import Groups
from beit3_dist.train.feed import StepBatch
from beit3_dist.train.optimizer import build_optimizer
from beit3_dist.train.passes import passes
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes
from tests.parallel.training import micro_batches, run_config
from tests.parallel.workers import run_workers

BOUNDED = {"text_head.bias": (-0.25, 0.5), "blocks.0.ffn.vision.fc1.weight": (-0.01, 0.01)}
OUTSIDE = 3.0


def held_after_a_step(groups: Groups, zero_stage: int, precision: str) -> dict[str, list[float]]:
    """Name -> least and greatest of what this rank holds: masters, then working weights."""
    config = run_config("shallow", zero_stage=zero_stage, accumulation=1, data_parallel=2, precision=precision)
    config = replace(config, optim=replace(config.optim, warmup_steps=0))
    objectives = objectives_of(config)

    def value(name: str, shape: torch.Size) -> torch.Tensor:
        first = objectives.first_value(name, shape, config.seed)
        return first.fill_(OUTSIDE) if name in BOUNDED else first

    engine = Engine(
        config,
        groups,
        objectives.build,
        value,
        lambda model: PretrainingModule(model, objectives, config.seed),
        lambda model, offload: build_optimizer(model, offload, config.optim),
        bounds=BOUNDED,
    )
    mine = micro_batches(config.model, 0, 2, range(groups.mesh.data_rank, groups.mesh.data_rank + 1))
    counts = torch.tensor(host_totals(mine, objectives).counts)
    groups.sum_over_data(counts)
    batch = StepBatch(mine, counts, torch.zeros(()))
    steps = passes(objectives, engine, batch, lambda _: precomputed_codes(config.model), average=None)
    engine.train_step(steps, counts, 0, 1e-3)
    held: dict[str, list[float]] = {}
    for piece in fragments(engine.model, engine.optimizer):
        held.setdefault(piece.name, []).extend(_range(piece.slice_of(piece.flat.detach())))
    parameters: Any = engine.model.named_parameters()
    for name, parameter in parameters:
        for working in (parameter.detach(), getattr(parameter, "ds_tensor", parameter).detach()):
            held.setdefault(name, []).extend(_range(working))
    return held


def _range(values: torch.Tensor) -> list[float]:
    return [float(v) for v in values.float().aminmax()] if values.numel() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_every_copy_is_clamped(zero_stage: int, precision: str) -> None:
    for held in run_workers(2, held_after_a_step, zero_stage, precision):
        for name, (least, greatest) in BOUNDED.items():
            assert held[name] or zero_stage in (1, 2, 3)
            assert all(value == pytest.approx(greatest, rel=1 / 256) for value in held[name]), (name, least)
        assert not all(abs(value) <= 0.01 for value in held["blocks.0.ffn.vision.fc2.weight"])
