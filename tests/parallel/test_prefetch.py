"""ZeRO-3 gathers parameters ahead of their modules in every step of a pipeline, too, and with the same bits."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from torch import nn

from beit3_dist.config import RunConfig
from beit3_dist.parallel import pipeline
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from tests.parallel.training import engine_run, run_config
from tests.parallel.workers import run_workers

VALIDATED = 1
"""The step after which a validation, whose forward passes have an order of their own, is run."""


def gathered_late(groups: Groups, config: RunConfig) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Of each step: modules whose parameters were not all gathered or on their way when they were to run, and all.
    Then the run."""
    steps: list[tuple[int, int]] = []
    late = modules = 0
    fetch, train_step = PartitionedParameterCoordinator.fetch_sub_module, Engine.train_step

    def noted_fetch(coordinator: Any, module: nn.Module, forward: bool) -> None:
        nonlocal late, modules
        parameters = [*iter_params(module, recurse=False)]
        late += any(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in parameters)
        modules += bool(parameters)
        fetch(coordinator, module, forward)

    def noted_step(engine: Engine, micro_batches: Any, *arguments: Any) -> Any:
        nonlocal late, modules
        late, modules, micro_batches = 0, 0, [*micro_batches]
        result = train_step(engine, micro_batches, *arguments)
        steps.append((late, modules))
        if len(steps) == VALIDATED + 1:
            engine.evaluate(micro_batches)
        return result

    with (
        patch.object(PartitionedParameterCoordinator, "fetch_sub_module", noted_fetch),
        patch.object(Engine, "train_step", noted_step),
    ):
        run = engine_run(groups, config)
    return steps, run


def both(groups: Groups, config: RunConfig) -> list[Any]:
    """With the order kept over whole steps, and as DeepSpeed has it: begun anew by every forward pass."""
    ours = gathered_late(groups, config)
    with patch.object(pipeline, "_trace_whole_steps", lambda engine: lambda: None):
        return [ours, gathered_late(groups, config)]


@pytest.mark.parametrize(
    ("replicas", "chunks"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)], ids=["1F1B", "interleaved"]
)
def test_stages_find_their_parameters_gathered(replicas: int, chunks: int) -> None:
    config = run_config(
        "paper", zero_stage=3, accumulation=2 * chunks, data_parallel=replicas, pipeline=2, chunks=chunks, steps=4
    )
    records = run_workers(2 * replicas, both, config, pipeline=2)
    for (ours, run), (theirs, before) in records:
        recorded, ahead, _, again = ours
        assert {modules for _, modules in (*ours, *theirs)} == {recorded[1]}, (ours, theirs)
        assert all(4 * late < recorded[0] for late, _ in (ahead, again)), ours
        assert run["losses"] == before["losses"] and run["grad_norms"] == before["grad_norms"]
        for name, (start, weights) in run["weights"].items():
            assert start == before["weights"][name][0] and np.array_equal(weights, before["weights"][name][1]), name
    (ours, _), (theirs, _) = records[0]  # the last stage of 1F1B goes backward after each forward pass anyway
    assert 3 * ours[-1][0] < theirs[-1][0], (ours, theirs)
