"""Multi-scale deformable attention (Zhu et al. 2021, equation 3) in plain torch.

No fused kernel stands beside it. torchvision's `deform_conv2d` bends the places of a convolution, whose weights all
queries share; here each query has its own. The kernel of Zhu et al. comes with no library that we could keep:
transformers downloads a compiled one at its first use and runs it unseen, mmcv's last release is of 2024 and is built
for one release of torch, and the packages of the kernel alone are older or at version 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi, prod, sin

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from beit3_dist.kernels.linear import Linear

Grid = tuple[int, int]
"""Height and width of a level."""


def centres(grids: Sequence[Grid], device: torch.device) -> Tensor:
    """Where the cells of some levels lie in the image, level by level: (x, y) in (0, 1), float32 [Q, 2]."""
    levels = []
    for height, width in grids:
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
        levels.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1))
    return torch.cat(levels)


def sampled(values: Tensor, grids: Sequence[Grid], places: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of values at some places, bilinear between the cells' centres and zero outside: [B, Q, H * d].

    values: [B, sum of h * w, H, d], level by level. places: (x, y) in the image, [B, Q, H, levels, P, 2]. weights:
    [B, Q, H, levels, P].
    """
    batch, queries, heads, _, points, _ = places.shape
    total = values.new_zeros(batch * heads, values.shape[-1], queries)
    parts = values.split([prod(grid) for grid in grids], 1)
    for level, (part, grid) in enumerate(zip(parts, grids, strict=True)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, -1, *grid)
        at = (2 * places[:, :, :, level] - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
        found = grid_sample(maps, at.to(maps.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
        shares = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (found * shares).sum(-1)
    return total.view(batch, -1, queries).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query looks at P places on each level, around its own, that it says itself. At first head h looks along the
    angle 2 pi h / H, its points 1 to P cells away, with even weights: `offsets` and `shares` start at zero, which a
    task's head says by `constants` (`starts_at_zero`)."""

    def __init__(self, width: int, heads: int, levels: int, points: int = 4, ratio: float = 1.0) -> None:
        """`ratio`: width of the values as a share of the queries'."""
        super().__init__()
        self.heads, self.levels, self.points, inner = heads, levels, points, int(width * ratio)
        self.offsets = Linear(width, heads * levels * points * 2)
        self.shares = Linear(width, heads * levels * points)
        self.values = Linear(width, inner)
        self.out = Linear(inner, width)

    def _first_offsets(self, device: torch.device) -> Tensor:
        """In cells, [H, 1, P, 2]: to the border of squares around the query."""
        angles = [2 * pi * head / self.heads for head in range(self.heads)]
        directions = torch.tensor([(cos(a) / max(abs(cos(a)), abs(sin(a))), sin(a) / max(abs(cos(a)), abs(sin(a))))
                                   for a in angles], device=device)  # fmt: skip
        steps = torch.arange(1, self.points + 1, device=device)
        return directions[:, None, None] * steps[:, None]

    def forward(self, queries: Tensor, references: Tensor, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        """queries [B, Q, D] whose places are `references` [Q, 2] (`centres`), tokens [B, sum of h * w, D] of the levels
        `grids` -> [B, Q, D]."""
        shape = (*queries.shape[:2], self.heads, self.levels, self.points)
        cells = torch.tensor([(w, h) for h, w in grids], device=queries.device)  # [levels, 2]
        offsets = self.offsets(queries).float().view(*shape, 2) + self._first_offsets(queries.device)
        places = references[:, None, None, None] + offsets / cells[:, None]
        weights = self.shares(queries).view(*shape[:3], -1).softmax(-1).view(shape)
        values = self.values(tokens).unflatten(-1, (self.heads, -1))
        return self.out(sampled(values, grids, places, weights))


def starts_at_zero(module: nn.Module) -> dict[str, float]:
    """The parameters of deformable attention in a module that start at zero, for `TaskHead.constants`."""
    parts = [name for name, part in module.named_modules() if isinstance(part, DeformableAttention)]
    return {f"{name}.{layer}.weight": 0.0 for name in parts for layer in ("offsets", "shares")}
