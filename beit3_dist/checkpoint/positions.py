"""Vision position tables and patch kernels for another resolution."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from beit3_dist.model.embedding import FIRST_POSITION, resampled_positions

FIRST_PATCH = FIRST_POSITION + 1
"""Rows before the first patch: two unused ones and CLS."""


def interpolate_positions(table: Tensor, grid: int, mode: str = "bicubic") -> Tensor:
    """[3 + g * g, D] -> [3 + grid * grid, D] in the table's precision: the first three rows stay, the patches' are
    resampled as `resampled_positions` says. `mode`: bilinear keeps between its neighbours what must not be negative."""
    kept, patches = table.split([FIRST_PATCH, len(table) - FIRST_PATCH])
    resampled = resampled_positions(patches, grid, grid, mode)
    return table if resampled is patches else torch.cat([kept, resampled])


def interpolate_patch(kernel: Tensor, side: int) -> Tensor:
    """The patch projection's weight [D, 3 * p * p] for patches of `side` pixels, [D, 3 * side * side], in its
    precision: resampled as an image, bicubic, its values as they are (EVA: interpolate_patch_14to16.py)."""
    old = isqrt(kernel.shape[1] // 3)
    if old == side:
        return kernel
    images = kernel.float().view(-1, 3, old, old)
    resampled = interpolate(images, size=(side, side), mode="bicubic", align_corners=False)
    return resampled.flatten(1).to(kernel.dtype)
