"""Every kernel against its definition in fp64, at the recipes' widths: values and all gradients."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from tests.device import DEVICE, ON_GPU
from tests.gpu.kernels import KERNELS, Function, Kernel

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative, by norms: some tens of fp32 roundings; two of fp16's 11 bits and of bf16's 8 bits."""
LAST = 8
"""Rows of a large matrix that are compared."""


def available(kernel: Kernel) -> None:
    """Skips the test where there is nothing to compute it."""
    if kernel.needs:
        try:
            found = importlib.util.find_spec(kernel.needs) is not None
        except ModuleNotFoundError:
            found = False
        if not (found and ON_GPU):
            pytest.skip(f"needs {kernel.needs} and a GPU")


def draw(kernel: Kernel, dtype: torch.dtype, rows: int | None = None) -> list[Tensor]:
    """The leaves, rounded to `dtype`; matrices of weights are as large as keeps a product's deviation near 1."""
    numbers, leaves = torch.Generator(DEVICE).manual_seed(1), []
    for number, shape in enumerate(kernel.shapes):
        if rows is not None and number < kernel.rowwise:
            shape = (rows, *shape[1:])
        leaf = torch.randn(shape, generator=numbers, device=DEVICE, dtype=torch.float32 if rows is None else dtype)
        if number >= kernel.rowwise and len(shape) == 2:
            leaf /= math.sqrt(shape[1])
        leaves.append(leaf.to(dtype))
    return leaves


def results(compute: Function, leaves: list[Tensor], last: int | None = None) -> list[Tensor]:
    """Results and gradients. `last`: the gradient of all rows but so many at the end is zero, and only these come."""
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    out = compute(*inputs)
    outputs = [out] if isinstance(out, Tensor) else out
    given = []
    for number, output in enumerate(outputs):
        shape = output.shape if last is None else (last, *output.shape[1:])
        numbers = torch.Generator(DEVICE).manual_seed(100 + number)
        gradient = torch.randn(shape, generator=numbers, device=DEVICE).to(torch.bfloat16)
        if last is not None and len(output) > last:
            whole = torch.zeros_like(output)
            whole[-last:] = gradient
            gradient = whole
        given.append(gradient.to(output.dtype))
    gradients = torch.autograd.grad(outputs, inputs, given)
    return [*(output.detach() for output in outputs), *gradients]


def assert_near(ours: Tensor, exact: Tensor, tolerance: float, what: str) -> None:
    """By norms: single elements may cancel to nearly nothing."""
    assert ours.shape == exact.shape, what
    difference, scale = (ours.double() - exact.double()).norm().item(), exact.double().norm().item()
    assert difference <= tolerance * scale, f"{what}: {difference / max(scale, 1e-30):.1e} exceeds {tolerance:.0e}"


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [pytest.param(k, t, id=f"{k.name}-{str(t).split('.')[1]}") for k in KERNELS for t in k.dtypes],
)
def test_kernels_equal_their_definitions(kernel: Kernel, dtype: torch.dtype) -> None:
    available(kernel)
    leaves = draw(kernel, dtype)
    ours = results(kernel.ours, leaves)
    exact = results(kernel.definition, [leaf.double() for leaf in leaves])
    assert len(ours) == len(exact)
    for number, (mine, theirs) in enumerate(zip(ours, exact, strict=True)):
        assert_near(mine, theirs, kernel.slack * TOLERANCE[dtype], f"{kernel.name}, tensor {number} of {len(ours)}")


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU's memory")
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.widest], ids=lambda k: k.name)
def test_more_elements_than_32_bits_count(kernel: Kernel) -> None:
    """The last rows, where a number of 32 bits would have wrapped around."""
    rows, dtype = (1 << 31) // kernel.widest + 2 * LAST, torch.bfloat16
    needed = (3 + 4 * kernel.rowwise) * 2 * rows * kernel.widest
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{free / 1e9:.0f} GB are free of the GPU's memory, {needed / 1e9:.0f} GB needed")
    leaves = draw(kernel, dtype, rows)
    ours = results(kernel.ours, leaves, LAST)
    ends = [leaf[-LAST:].double() if n < kernel.rowwise else leaf.double() for n, leaf in enumerate(leaves)]
    exact = results(kernel.definition, ends, LAST)
    del leaves
    for number, (mine, theirs) in enumerate(zip(ours, exact, strict=True)):
        mine = mine[-LAST:] if mine.shape != theirs.shape else mine
        assert_near(mine, theirs, kernel.slack * TOLERANCE[dtype], f"{kernel.name}, tensor {number} of {len(ours)}")
    del ours
    torch.cuda.empty_cache()
