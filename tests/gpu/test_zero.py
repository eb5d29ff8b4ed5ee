"""The real Engine under NCCL in one process: ZeRO stages and kinds of kernels against plain torch on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.device import ON_GPU
from tests.parallel.test_layouts import Layout, compare, reference
from tests.parallel.workers import KeptWorkers


@pytest.fixture(scope="module")
def workers() -> Iterator[KeptWorkers]:
    kept = KeptWorkers()
    yield kept
    kept.close()


LAYOUTS = {
    "zero0": Layout(0, "paper", accumulation=2, steps=3),
    "zero1": Layout(1, "paper", accumulation=1, steps=3),
    "zero1-clip": Layout(1, "released", accumulation=2, clip_norm=0.5, steps=3),
    "zero2": Layout(2, "released", accumulation=2, clip_norm=0.5, steps=3),
    "zero2-selective": Layout(2, "paper", accumulation=1, recompute="selective", steps=3),
    "zero1-triton": Layout(1, "paper", accumulation=2, kernels="triton", steps=3),
    "zero1-full-triton": Layout(1, "paper", accumulation=1, recompute="full", kernels="triton", steps=3),
    "zero3-triton": Layout(3, "released", accumulation=2, clip_norm=0.5, kernels="triton", steps=3),
    "zero3-full-sgd": Layout(3, "paper", accumulation=2, recompute="full", clip_norm=0.5, sgd=True, steps=3),
    "zero3": Layout(3, "paper", accumulation=1, steps=3),
}
"""Few models, accumulations and bounds of the norm: the plain runs on the CPU are made once for each."""


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_stage_equals_one_plain_process(layout: Layout, workers: KeptWorkers) -> None:
    if not ON_GPU and layout.kernels == "triton" and layout.recompute == "full":
        pytest.skip("takes Triton's interpreter minutes")
    compare(layout.run(workers), layout)


@pytest.mark.parametrize(("zero_stage", "kernels"), [(1, "torch"), (1, "triton"), (2, "triton"), (3, "torch")])
def test_bf16_learns_what_fp32_does(zero_stage: int, kernels: str, workers: KeptWorkers) -> None:
    """Losses of three steps, to bf16's three digits."""
    layout = Layout(zero_stage, "paper", accumulation=2, kernels=kernels, steps=3)  # type: ignore[arg-type]
    ours = torch.tensor(layout.run(workers, "bf16").losses)
    fp32 = torch.tensor(reference("paper", 2, 3.0, False, 3).losses)
    assert 0 < (ours - fp32).norm() <= 4e-3 * fp32.norm()


@pytest.mark.skipif(not ON_GPU, reason="takes Triton's interpreter minutes")
def test_bf16_gradients_that_nobody_sums_up(workers: KeptWorkers) -> None:
    """One micro-batch on one replica: AdamW's kernel reads them where they lie."""
    ours = torch.tensor(Layout(1, "paper", accumulation=1, kernels="triton", steps=3).run(workers, "bf16").losses)
    fp32 = torch.tensor(reference("paper", 1, 3.0, False, 3).losses)
    assert 0 < (ours - fp32).norm() <= 4e-3 * fp32.norm()
