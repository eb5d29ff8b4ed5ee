"""Recorded blocks under DeepSpeed: ZeRO-1 takes the gradients that the graphs leave, once or added up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from beit3_dist.config import RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.parallel import engine
from beit3_dist.parallel.mesh import Groups
from tests.graphs import StandIn, fuse
from tests.parallel.training import engine_run, run_config
from tests.parallel.workers import run_workers


def runs(groups: Groups, configs: list[RunConfig]) -> list[tuple[list[Any], list[float], int]]:
    """Losses, norms and the number of recordings of the same run with and without graphs."""
    found = []
    for config in configs:
        changes: list[dict[str, Any]] = [{}, {"Graphs": lambda *_: None}]
        for instead in changes:
            models: list[BEiT3] = []
            recorders: list[StandIn] = []

            def use(model: BEiT3, *_: Any, models: list[BEiT3] = models) -> None:
                fuse(model)
                models.append(model)

            def recorder(models: list[BEiT3] = models, recorders: list[StandIn] = recorders) -> StandIn:
                recorders.append(StandIn(models[0]))
                return recorders[0]

            instead |= {"use_kernels": use, "CudaRecorder": recorder}
            with patch.multiple(engine, **instead):
                run = engine_run(groups, config, multiple=16)
            found.append((run["losses"], run["grad_norms"], recorders[0].recordings))
    return found


def test_a_run_is_the_same_bit_for_bit() -> None:
    shapes = dict(zero_stage=1, data_parallel=1, precision="bf16", layers=3, steps=3)
    configs = [
        replace(run_config("paper", accumulation=n, **shapes), cuda_graphs=True)  # type: ignore[arg-type]
        for n in (1, 4)
    ]
    [found] = run_workers(1, runs, configs)
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[2] >= 1 and theirs[2] == 0
