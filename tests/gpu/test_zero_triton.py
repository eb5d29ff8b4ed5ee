"""As test_zero.py, by our kernels: compiling them for each type takes most of the time, and so passes in a process of
its own."""

from __future__ import annotations

import pytest

from tests.device import ON_GPU
from tests.gpu.layouts import losses_near_fp32
from tests.parallel.test_layouts import Layout, compare
from tests.parallel.workers import KeptWorkers

LAYOUTS = {
    "zero1": Layout(1, "shallow", accumulation=2, kernels="triton", steps=2),
    "zero1-full": Layout(1, "shallow", accumulation=1, recompute="full", kernels="triton", steps=2),
    "zero3": Layout(3, "released", accumulation=2, clip_norm=0.5, kernels="triton", steps=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_stage_equals_one_plain_process(layout: Layout, workers: KeptWorkers) -> None:
    if not ON_GPU and layout.recompute == "full":
        pytest.skip("takes Triton's interpreter minutes")
    compare(layout.run(workers), layout)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("zero_stage", [1, 2])
def test_bf16_learns_what_fp32_does(zero_stage: int, accumulation: int, workers: KeptWorkers) -> None:
    """At ZeRO-1 AdamW's kernel reads the gradients of a single micro-batch where they lie."""
    if not ON_GPU and accumulation == 1:
        pytest.skip("takes Triton's interpreter minutes")
    losses_near_fp32(Layout(zero_stage, "shallow", accumulation=accumulation, kernels="triton"), workers)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU; tests/parallel/test_graphs.py has a stand-in")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_graphs_learn_what_fp32_does(accumulation: int, workers: KeptWorkers) -> None:
    """The third micro-batch and those after it are repeated."""
    layout = Layout(1, "paper", accumulation=accumulation, kernels="triton", steps=4)
    losses_near_fp32(layout, workers, cuda_graphs=True)
