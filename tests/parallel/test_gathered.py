"""What ZeRO-3 gathers in a micro-batch, as the planner has it and as real steps do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beit3_dist.config import RunConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.parallel.memory import state_bytes
from beit3_dist.parallel.mesh import Groups
from beit3_dist.plan.layouts import Layout, gathered
from beit3_dist.tools.plans.on_cpu import OTHER, Steps, run_config
from tests.parallel.workers import run_workers
from tests.scale.counting import counting

MODEL = replace(OTHER, layers=8, width=128, heads=4, ffn_width=512)  # 4.2M parameters
SHORT = {"stage3_max_reuse_distance": 5_000_000, "stage3_prefetch_bucket_size": 1000}
CASES: list[tuple[dict[str, int], Any, float]] = [
    # (settings, activation_checkpointing, by how much of it the plan may be off)
    ({}, "none", 0.01),  # DeepSpeed's defaults keep all of a small model from the forward to the backward pass
    ({}, "full", 0.01),
    (SHORT, "none", 0.05),
    (SHORT, "full", 0.08),  # modules are not let go one by one
]


def gathered_bytes(groups: Groups, configs: list[RunConfig], folder: Path) -> list[int]:
    """For `run_workers`: what a step of each run gathers here, when DeepSpeed knows the order of its modules."""
    found = []
    for config in configs:
        steps = Steps(groups, config)
        steps.step()
        steps.step()
        with counting(folder) as count:
            steps.step()
            messages = count.mark().messages
        found.append(groups.mesh.data * sum(size * n for (name, size), n in messages.items() if "gather" in name))
    return found


def test_what_zero3_gathers(tmp_path: Path) -> None:
    configs = []
    for number, (settings, recompute, _) in enumerate(CASES):
        file = tmp_path / f"{number}.json"
        zero = {"stage": 3, "stage3_param_persistence_threshold": 1000} | settings
        file.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": zero}))
        configs.append(run_config(MODEL, Layout(3, 1, False, 1, recompute, 1), file=str(file), samples=2))
    measured, _ = run_workers(2, gathered_bytes, configs, tmp_path)
    for (settings, recompute, off), config, taken in zip(CASES, configs, measured, strict=True):
        objectives = objectives_of(config)
        [part] = state_bytes(config, 2, objectives.build(), objectives.largest)
        expected = 4 * gathered(part, recompute)
        print(settings, recompute, f"{taken / 4 / part.parameters:.3f} of the model, planned {expected / taken:.3f} x")
        assert taken == pytest.approx(expected, rel=off)
    assert measured[2] > 1.3 * measured[0], "the short distance lets modules go"
