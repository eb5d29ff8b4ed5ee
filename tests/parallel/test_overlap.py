"""Gradients are sent while the backward pass makes others, at every stage, by default and with the same bits."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from deepspeed.comm.torch import TorchBackend
from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.model.block import Block
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from tests.parallel.training import engine_run, run_config
from tests.parallel.workers import run_workers

SENDING = ("all_reduce", "reduce_scatter_tensor", "reduce")
"""DeepSpeed's collectives by which some stage sends gradients."""
FIRST = "the first block's backward pass"


def order_of_events(groups: Groups, config: RunConfig) -> tuple[list[str], list[float], list[float]]:
    """Of a rank's first step, from the begin of its last backward pass to its end: what was sent and when the first
    block's backward pass began. Then losses and norms of the run."""
    events: list[str] = []
    steps: list[list[str]] = []
    train_step, forward = Engine.train_step, Block.forward

    def noted_forward(block: Block, *arguments: Any, **keywords: Any) -> Tensor:
        y: Tensor = forward(block, *arguments, **keywords)
        if block is first and y.requires_grad:
            y.register_hook(lambda gradient: events.append(FIRST))
        return y

    def noted_step(engine: Engine, *arguments: Any) -> Any:
        nonlocal first
        first = engine.model.blocks["0"]
        backward = engine.deepspeed.backward

        def noted_backward(*given: Any, **keywords: Any) -> None:
            events.clear()
            backward(*given, **keywords)
            steps.append([*events])

        with patch.object(engine.deepspeed, "backward", noted_backward):
            return train_step(engine, *arguments)

    first: Any = None
    with ExitStack() as stack:
        for name in SENDING:
            send = getattr(TorchBackend, name)

            def noted(*arguments: Any, send: Any = send, **keywords: Any) -> Any:
                events.append("sent")
                return send(*arguments, **keywords)

            stack.enter_context(patch.object(TorchBackend, name, noted))
        stack.enter_context(patch.object(Engine, "train_step", noted_step))
        stack.enter_context(patch.object(Block, "forward", noted_forward))
        run = engine_run(groups, config)
    return steps[config.batch.accumulation - 1], run["losses"], run["grad_norms"]


def both(groups: Groups, configs: list[RunConfig]) -> list[Any]:
    return [order_of_events(groups, config) for config in configs]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_the_first_gradients_are_sent_before_the_last_ones_are_made(precision: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 4000}
    configs, stages = [], (1, 2, 3) if precision == "bf16" else (0, 1, 2, 3)
    for stage in stages:
        config = run_config("shallow", zero_stage=stage, precision=precision, accumulation=2, data_parallel=2, steps=2)
        for name, chosen in (("default", {}), ("without", {"overlap_comm": False})):
            file = tmp_path / f"{stage}{name}.json"
            file.write_text(json.dumps({"zero_optimization": small | chosen}))
            configs.append(replace(config, deepspeed_config=str(file)))
    for found in run_workers(2, both, configs):
        for stage, ours, without in zip(stages, found[::2], found[1::2], strict=True):
            events, *results = ours
            assert events.count(FIRST) == 1 and "sent" in events[: events.index(FIRST)], (stage, events)
            assert results == [*without[1:]], f"ZeRO-{stage} has other bits where it overlaps"
