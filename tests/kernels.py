"""The contract of a kernel: a version of an operation computes what its definition does in fp64, values and gradients.

The tests of it go by the registry, on the CPU (Triton's by its interpreter) and, with the recipes' widths, on a GPU.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from beit3_dist.kernels.registry import Operation, Sizes, Version, operations
from tests.device import ON_GPU

TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-5 if ON_GPU else 2e-6,
    torch.float16: 2e-3 if ON_GPU else 1e-3,
    torch.bfloat16: 2e-2 if ON_GPU else 8e-3,
}
"""Relative, by norms, for each rounding to the type on the way: some tens of roundings of fp64 and of fp32, in which
sums are kept; one or two of fp16's 11 bits and of bf16's 8 bits. On a GPU sums have some thousand terms."""


def remember_builtins() -> None:
    """Triton's interpreter looks for the language's builtins at each call of a function, a third of its time. They do
    not change: from here on it finds them once."""
    from triton.runtime import interpreter

    is_builtin = interpreter.tl.core.is_builtin

    @cache
    def builtins(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: object, builder: object, scope: object) -> None:
        for name in builtins(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if "TRITON_INTERPRET" in os.environ and sys.platform == "linux":
    remember_builtins()


def versions() -> list[object]:
    """All versions of all operations, and all types, as parameters of a test."""
    return [
        pytest.param(operation, version, dtype, id=f"{operation.name}-{version.name}-{str(dtype).split('.')[1]}")
        for operation in operations().values()
        for version in operation.versions
        for dtype in TOLERANCE
    ]


def check(operation: Operation, version: Version, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
    """Compares all cases. Skips the test where the version does not serve."""
    for case in operation.cases(sizes):
        lacking = version.lacks(case.place(device.type, dtype))
        if lacking:
            pytest.skip(f"needs {lacking}")
        leaves = case.leaves(device, dtype)
        exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        with torch.no_grad():
            shown = case.call(operation.definition, *leaves)  # of the shapes and types that are expected
        given = draw(shown)
        ours = case.train(operation.function(version), leaves, given)
        exact = case.train(operation.definition, exact_leaves, given)
        assert [t.dtype for t in ours] == [t.dtype for t in (*shown, *leaves)][: len(ours)]
        assert_near(ours, exact, version.roundings, dtype, f"{operation.name} {version.name}, {case.label}")


def draw(results: Sequence[Tensor]) -> list[Tensor]:
    """Their gradients, numbers that all types hold."""
    numbers = torch.Generator(results[0].device).manual_seed(2)
    eighths = [torch.randint(-24, 25, t.shape, generator=numbers, device=t.device) for t in results]
    return [(one / 8).to(result.dtype) for one, result in zip(eighths, results, strict=True)]


def assert_near(ours: Sequence[Tensor], exact: Sequence[Tensor], roundings: int, dtype: torch.dtype, what: str) -> None:
    """By norms: single elements may cancel to nearly nothing."""
    tolerance = roundings * TOLERANCE[dtype]
    for number, (mine, theirs) in enumerate(zip(ours, exact, strict=True)):
        assert mine.shape == theirs.shape
        difference, scale = (mine.double() - theirs.double()).norm().item(), theirs.double().norm().item()
        told = f"{what}: tensor {number} of {len(ours)} differs by {difference / (scale or 1):.1e}"
        assert difference <= tolerance * scale, told
