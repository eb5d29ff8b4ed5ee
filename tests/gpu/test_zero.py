"""The real Engine under NCCL in one process: ZeRO stages, by torch's kernels, against plain torch on the CPU."""

from __future__ import annotations

import pytest

from tests.gpu.layouts import losses_near_fp32
from tests.parallel.test_layouts import Layout, compare
from tests.parallel.workers import KeptWorkers

LAYOUTS = {
    "zero0": Layout(0, "shallow", accumulation=2, steps=2),
    "zero1-clip": Layout(1, "shallow", accumulation=2, clip_norm=0.5, steps=2),
    "zero2-selective": Layout(2, "shallow", accumulation=2, recompute="selective", steps=2),
    "zero3": Layout(3, "shallow", accumulation=2, clip_norm=0.5, steps=2),
    "zero3-full-sgd": Layout(3, "released", accumulation=2, recompute="full", clip_norm=0.5, sgd=True, steps=2),
}
"""Few models, accumulations and bounds of the norm: the plain runs on the CPU are made once for each."""


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_stage_equals_one_plain_process(layout: Layout, workers: KeptWorkers) -> None:
    compare(layout.run(workers), layout)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_learns_what_fp32_does(zero_stage: int, workers: KeptWorkers) -> None:
    losses_near_fp32(Layout(zero_stage, "shallow", accumulation=2), workers)
