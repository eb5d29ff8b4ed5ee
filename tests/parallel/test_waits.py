"""Where the host waits for the device in a training step: once, for the gradient's norm and what comes with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beit3_dist.config import RunConfig
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from tests.parallel.training import engine_run, run_config
from tests.parallel.workers import run_workers
from tests.waits import waits

READS_NORM = {1: "step", 2: "scaled_global_norm", 3: "_get_norm_groups"}
"""ZeRO stage -> the function of parallel/flat_step.py that reads the norm off the device; statistics come beside it."""


def counted_run(groups: Groups, config: RunConfig) -> dict[str, int]:
    """`engine_run`; where its last step waited."""
    original, found = Engine.train_step, {}

    def counting(self: Engine, *args: Any) -> Any:
        states = [value for state in self.optimizer.optimizer.state.values() for value in state.values()]
        on_device = [*self.model.parameters(), *(t for t in states if isinstance(t, torch.Tensor) and t.dim()), args[1]]
        with waits(on_device) as counter:
            result = original(self, *args)
        found.clear()
        found.update(counter)
        return result

    Engine.train_step = counting  # type: ignore[method-assign]
    try:
        engine_run(groups, config)
    finally:
        Engine.train_step = original  # type: ignore[method-assign]
    return dict(found)


def check_one_wait(zero_stage: int, precision: str) -> None:
    """Of a step's two micro-batches, preparing their inputs and targets included."""
    config = run_config("shallow", zero_stage=zero_stage, accumulation=2, data_parallel=1, precision=precision, steps=3)
    [found] = run_workers(1, counted_run, config)
    reads = READS_NORM[2] if (zero_stage, precision) == (1, "fp32") else READS_NORM[zero_stage]
    assert found == {f"parallel/flat_step.py:{reads}": 1}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_waits_once(zero_stage: int, precision: str) -> None:
    check_one_wait(zero_stage, precision)
