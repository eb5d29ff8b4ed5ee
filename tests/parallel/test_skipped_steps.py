"""A step whose loss or gradient is not finite changes nothing, on any rank, at any ZeRO stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from beit3_dist.config import RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import initial_value
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.fragments import fragments, optimizer_state
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.pipeline import plan_stages
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes
from tests.parallel.training import build, micro_batches, run_config
from tests.parallel.workers import run_workers

BAD_STEPS = {2: "loss", 3: "gradient", 4: "copy"}
STEPS = 6


class SometimesBad(PretrainingModule):
    """In the last replica one micro-batch of a bad step has an infinite loss with a finite gradient, or a finite loss
    with a gradient that is NaN at one element."""

    is_last_replica = False
    step, calls = 0, 0

    def losses(self, x_TD: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        kind = BAD_STEPS.get(self.step) if self.is_last_replica and self.calls == 1 else None
        self.calls += 1
        if kind == "gradient":
            x_TD.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), float("nan")))
        contribution, statistics = super().losses(x_TD, *arguments)
        return (contribution + float("inf") if kind == "loss" else contribution), statistics


def state_of(engine: Engine) -> dict[str, np.ndarray]:
    """A copy of all that a step changes on this rank, by name: weights, moments, the optimizer's counts."""
    state: dict[str, np.ndarray] = {}
    for piece in fragments(engine.model, engine.optimizer):
        state[piece.name] = piece.slice_of(piece.flat.detach()).numpy().copy()
        for key, moment in optimizer_state(engine.optimizer, piece).items():
            state[f"{piece.name}/{key}"] = moment.numpy().copy()
    for name, parameter in engine.model.named_parameters():  # what the next forward pass computes with
        working = getattr(parameter, "ds_tensor", parameter)
        state[f"{name}/working"] = working.detach().float().numpy().copy()
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state["counts"] = np.array([float(entry["step"]) for entry in inner.state.values()])
    return state


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def run(groups: Groups, config: RunConfig, steps: list[int], bad: bool) -> dict[str, np.ndarray]:
    """The state after the steps of these numbers. With `bad`, those of BAD_STEPS must change nothing."""
    mesh = groups.mesh
    engine = Engine(
        config,
        groups,
        lambda: BEiT3(config.model, device="meta"),
        lambda name, shape: initial_value(name, shape, config.model, config.seed),
        plan=plan_stages(config, *objectives_of(config).largest(mesh.data)) if mesh.pipeline > 1 else None,
        objective=lambda model: SometimesBad(model, objectives_of(config), config.seed),
        optimizer=lambda model, offload: build(model, offload, config, sgd=False),
    )
    module = engine.deepspeed.module
    objective = getattr(module, "objective", module)
    objective.is_last_replica = bad and mesh.data_rank == mesh.data - 1
    parts = mesh.data * config.batch.accumulation
    for step in steps:
        before = state_of(engine) if step in BAD_STEPS else {}
        mine = micro_batches(config.model, step, parts, range(mesh.data_rank, parts, mesh.data))
        counts = torch.tensor(host_totals(mine, objectives_of(config)).counts)
        groups.sum_over_data(counts)
        objective.step, objective.calls = step, 0
        spoil = objective.is_last_replica and BAD_STEPS.get(step) == "copy" and mesh.tensor_rank == mesh.tensor - 1
        handle = spoilt_copy(engine) if spoil else None
        prepared = (objectives_of(config).prepare(b, mesh.device, precomputed_codes(config.model)) for b in mine)
        result = engine.train_step(prepared, counts, step, 1e-3)
        if handle is not None:
            handle.remove()
        assert result.skipped == (step in BAD_STEPS), f"step {step}: gradient norm {result.grad_norm}"
        assert not result.skipped or same(before, state_of(engine)), f"step {step} has changed the state"
    return state_of(engine)


def spoilt_copy(engine: Engine) -> RemovableHandle:
    """The next gradients of a parameter have an infinity on this rank alone: of a copy that is not the one which counts
    in the norm, where this rank has such."""
    parameters: list[Any] = [p for p in engine.model.parameters() if p.requires_grad]
    copy = next((p for p in parameters if not p.model_parallel), parameters[0])
    handle: RemovableHandle = copy.register_hook(lambda gradient: gradient + float("inf"))
    return handle


def with_and_without(groups: Groups, configs: list[RunConfig]) -> None:
    """A run with bad steps must end bit for bit like the one that never took them."""
    for config in configs:
        good = [step for step in range(STEPS) if step not in BAD_STEPS]
        ours, reference = run(groups, config, list(range(STEPS)), True), run(groups, config, good, False)
        assert same(ours, reference), f"{config.parallel} {config.precision}: later steps went otherwise"
        assert (reference["counts"] == len(good)).all(), "the reference has not trained"


CASES = {
    "dp2-fp32": (2, 1, 1, [(stage, "fp32") for stage in range(4)]),
    "dp2-bf16": (2, 1, 1, [(stage, "bf16") for stage in (1, 2, 3)]),
    "tp2pp2": (1, 2, 2, [(0, "fp32"), (1, "fp32"), (1, "bf16"), (3, "bf16")]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor", "pipeline", "kinds"), CASES.values(), ids=CASES.keys())
def test_bad_steps_leave_no_trace(data: int, tensor: int, pipeline: int, kinds: list[tuple[int, str]]) -> None:
    configs = [
        run_config("paper", zero_stage=stage, precision=precision, accumulation=2, data_parallel=data, tensor=tensor,
                   pipeline=pipeline, steps=STEPS)
        for stage, precision in kinds
    ]  # fmt: skip
    run_workers(data * tensor * pipeline, with_and_without, configs, tensor=tensor, pipeline=pipeline)
