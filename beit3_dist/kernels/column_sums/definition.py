"""Sums over rows: the gradients of biases."""

from __future__ import annotations

from torch import Tensor


def plain_column_sums(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """[rows, width] -> [width]. factors: those of the rows [rows]; None: ones."""
    return (x if factors is None else x * factors[:, None]).sum(0)
