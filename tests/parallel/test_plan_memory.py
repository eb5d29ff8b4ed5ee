"""The planner's memory against the bytes of real steps, counted by allocation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from beit3_dist.plan.devices import Device, Link
from beit3_dist.plan.layouts import Layout
from beit3_dist.tools.plans.on_cpu import MODEL, peak_bytes, planned, run_config
from tests.parallel.training import SMALL_PIECES
from tests.parallel.workers import run_workers

SMALL = replace(MODEL, width=128, heads=4, ffn_width=512, image_size=96, vocab_size=1010, visual_vocab_size=512)
LINK = Link(1e9, 1e-5)
CPU = Device("cpu", 8, 0, 1e10, LINK, LINK, "of no use here", gpu=False, products=[(1.0, 1e10)], core_rate=1e10)
RUNS = (  # of two processes
    (Layout(1, 1, False, 1, "none", 1), "bf16"),
    (Layout(3, 1, False, 1, "full", 2), "bf16"),
    (Layout(2, 1, False, 1, "attention", 1), "fp32"),
    (Layout(1, 1, False, 1, "selective", 2), "fp32"),
    (Layout(1, 2, False, 1, "none", 1), "fp32"),
    (Layout(3, 2, True, 1, "attention", 2), "bf16"),
    (Layout(1, 1, False, 2, "none", 4), "fp32"),
    (Layout(3, 1, False, 2, "selective", 2), "bf16"),
)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)], ids=["dp2", "tp2", "pp2"])
def test_the_peak_of_a_step(tensor: int, pipeline: int) -> None:
    own = [run for run in RUNS if (run[0].tensor, run[0].pipeline) == (tensor, pipeline)]
    configs = [run_config(SMALL, layout, precision, str(SMALL_PIECES)) for layout, precision in own]
    measured = run_workers(2, peak_bytes, configs, tensor=tensor, pipeline=pipeline)
    pairs = [
        (planned(CPU, run[0], SMALL, run[1], str(SMALL_PIECES)), max(peaks))
        for run, *peaks in zip(own, *measured, strict=True)
    ]
    for plan, peak in pairs:
        print(plan.layout, f"{peak / 1e6:.1f} MB, planned {plan.memory.total / 1e6:.1f}", plan.memory)
    for plan, peak in pairs:
        assert plan.memory.total == pytest.approx(peak, rel=0.05), plan.layout
