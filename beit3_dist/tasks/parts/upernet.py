"""UPerNet's decoder (Xiao et al. 2018): pyramid pooling on the coarsest map, a feature pyramid, one map of all levels.

As in mmsegmentation, but that a pixel's channels are normed in place of a batch, so that no picture changes another's
result in any layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from beit3_dist.model.pyramid import ChannelNorm

POOLED = (1, 2, 3, 6)
"""Sides of the grids that the coarsest map is pooled to."""
DROPPED = 0.1
"""Share of the channels that a training image lacks before the classifier."""


def convolution(given: int, made: int, side: int) -> nn.Sequential:
    """A convolution of this side with norm and ReLU; maps keep their size."""
    return nn.Sequential(nn.Conv2d(given, made, side, padding=side // 2, bias=False), ChannelNorm(made), nn.ReLU())


def resized_to(one: Tensor, like: Tensor | Sequence[int]) -> Tensor:
    """A map [B, C, h, w] in the height and width of another one, bilinear."""
    size = like.shape[2:] if isinstance(like, Tensor) else tuple(like)
    return interpolate(one, size=size, mode="bilinear", align_corners=False)


class UPerNet(nn.Module):
    """Four maps [B, C, ...] -> features of the finest one's size, [B, width, h, w]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.pooled = nn.ModuleList([convolution(channels, width, 1) for _ in POOLED])
        self.bottleneck = convolution(channels + len(POOLED) * width, width, 3)
        self.lateral = nn.ModuleList([convolution(channels, width, 1) for _ in range(3)])
        self.smoothed = nn.ModuleList([convolution(width, width, 3) for _ in range(3)])
        self.joined = convolution(4 * width, width, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, last = maps
        pooled = [resized_to(of(adaptive_avg_pool2d(last, side)), last)
                  for of, side in zip(self.pooled, POOLED, strict=True)]  # fmt: skip
        levels = [self.bottleneck(torch.cat([last, *pooled], 1))]
        for lateral, one in zip(reversed(list(self.lateral)), reversed(finer), strict=True):
            levels.append(lateral(one) + resized_to(levels[-1], one))
        levels = levels[::-1]
        out = [of(one) for of, one in zip(self.smoothed, levels[:3], strict=True)] + [levels[3]]
        return self.joined(torch.cat([out[0], *(resized_to(one, out[0]) for one in out[1:])], 1))
