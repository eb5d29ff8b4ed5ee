"""Vision position tables for another resolution."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import interpolate

FIRST_PATCH = 3
"""Rows before the first patch: two unused ones and CLS."""


def interpolate_positions(table: Tensor, grid: int) -> Tensor:
    """[3 + g * g, D] -> [3 + grid * grid, D] in the table's precision, as unilm's fine-tuning code does it: the first
    three rows stay, the patches' are resampled as an image, bicubic with `align_corners=False`, in float32."""
    old = isqrt(len(table) - FIRST_PATCH)
    if old == grid:
        return table
    kept, patches = table.split([FIRST_PATCH, old * old])
    image = patches.float().T.reshape(1, -1, old, old)
    resampled = interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([kept, resampled.flatten(2)[0].T.to(table.dtype)])
