"""Every version of every operation against its definition in fp64, at the recipes' widths: values and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from beit3_dist.kernels.registry import Case, Operation, Sizes, Version, operations
from tests.device import DEVICE, ON_GPU
from tests.kernels import assert_near, check, draw, versions

GIANT = Sizes(tokens=4099, width=1408, ffn_width=6144, heads=16, masked=515, classes=64_010)
"""The giant's widths, rows that no power of two is, and of the recipes' text head no multiple of 16 bytes in bf16."""
SIZES = GIANT if ON_GPU else Sizes(tokens=5, width=24, ffn_width=40, heads=3, masked=3, classes=70)
LAST = 8
"""Rows of a large matrix that are compared."""


@pytest.mark.parametrize(("operation", "version", "dtype"), versions())
def test_kernels_equal_their_definitions(operation: Operation, version: Version, dtype: torch.dtype) -> None:
    check(operation, version, SIZES, DEVICE, dtype)


def large(operation: Operation, number: int) -> tuple[int, Case]:
    """A case of so many rows that a matrix has more elements than 32 bits count, and the columns of the widest one."""
    case = operation.cases(GIANT)[number]
    widest = max(n for i, shape in enumerate(case.shapes) for n in (shape[1:] if i < case.rowwise else shape))
    rows = (1 << 31) // widest + 2 * LAST
    return widest, operation.cases(replace(GIANT, tokens=rows, masked=rows))[number]


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU's memory")
@pytest.mark.parametrize(
    ("operation", "number"),
    [
        pytest.param(operation, number, id=f"{operation.name}, {case.label}")
        for operation in operations().values()
        for number, case in enumerate(operation.cases(GIANT))
        if case.separate and any(version.name == "triton" for version in operation.versions)
    ],
)
def test_more_elements_than_32_bits_count(operation: Operation, number: int) -> None:
    """The last rows, where a number of 32 bits would have wrapped around."""
    (widest, case), dtype, version = large(operation, number), torch.bfloat16, operation.version("triton")
    assert not version.lacks(case.place("cuda", dtype))
    rows = case.shapes[0][0]
    needed = (3 + 4 * case.rowwise) * 2 * rows * widest
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{free / 1e9:.0f} GB are free of the GPU's memory, {needed / 1e9:.0f} GB needed")
    leaves = case.leaves(DEVICE, dtype)
    ends = [
        (leaf[-LAST:] if n < case.rowwise else leaf).detach().double().requires_grad_() for n, leaf in enumerate(leaves)
    ]
    last = draw(case.call(operation.definition, *ends))
    given = [torch.cat([end.new_zeros(rows - LAST, *end.shape[1:], dtype=dtype), end.to(dtype)]) for end in last]
    ours = case.train(operation.function(version), leaves, given)
    exact = case.train(operation.definition, ends, last)
    del leaves, given
    ours = [mine[-LAST:] if mine.shape != theirs.shape else mine for mine, theirs in zip(ours, exact, strict=True)]
    assert_near(ours, exact, version.roundings, dtype, f"{operation.name}, {case.label}")
    del ours
    torch.cuda.empty_cache()
