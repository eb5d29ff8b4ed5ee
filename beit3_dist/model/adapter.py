"""ViT-Adapter (Chen et al. 2023): convolutions beside the vision experts, which exchange features with them.

The names of the parts are the paper's. Where the released code has SyncBN a pixel's channels are normed.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate

from beit3_dist.config import ModelConfig, require
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.deformable import DeformableAttention, Grid, centres, starts_at_zero
from beit3_dist.model.pyramid import GLOBAL, ChannelNorm, Pyramid, VisionPass, Windows, padded

INTERACTIONS = 4
"""Equal parts of the stack, each between an injector and an extractor."""
POINTS, VALUE_RATIO, FFN_RATIO = 4, 0.5, 0.25
INJECTED_AT_FIRST = 1e-6
"""Factor of what injectors add, at the start (the released BEiT adapters)."""
STEM, WIDER = 64, (128, 256, 256)
"""Channels of the spatial prior: at the finest level, and at the others."""


def _convolution(given: int, made: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, made, 3, stride, 1, bias=False), ChannelNorm(made), nn.ReLU())


class SpatialPrior(nn.Module):
    """Images -> four maps [B, D, ...] at the pyramid's strides, by convolutions alone."""

    def __init__(self, width: int, finest: int) -> None:
        """`finest`: stride of the first map: 1, 2 or 4."""
        super().__init__()
        self.stem = nn.Sequential(
            _convolution(3, STEM, min(finest, 2)), _convolution(STEM, STEM, 1), _convolution(STEM, STEM, 1),
            nn.MaxPool2d(3, 2, 1) if finest == 4 else nn.Identity(),
        )  # fmt: skip
        channels = (STEM, *WIDER)
        self.coarser = nn.ModuleList([_convolution(a, b, 2) for a, b in pairwise(channels)])
        self.out = nn.ModuleList([nn.Conv2d(wide, width, 1) for wide in channels])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for convolution in self.coarser:
            maps.append(convolution(maps[-1]))
        return [out(one) for out, one in zip(self.out, maps, strict=True)]


class Injector(nn.Module):
    """x + gamma attention(norm(x), norm(c)): the ViT's patches look at the prior's levels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query_norm, self.norm = (LayerNorm(config.width) for _ in range(2))
        self.attention = DeformableAttention(config.width, config.heads, 3, POINTS, VALUE_RATIO)
        self.gamma = nn.Parameter(torch.empty(config.width))

    def forward(self, x_BPD: Tensor, grid: Grid, c_BQD: Tensor, grids: list[Grid]) -> Tensor:
        own = centres([grid], x_BPD.device)
        return x_BPD + self.gamma * self.attention(self.query_norm(x_BPD), own, self.norm(c_BQD), grids)


class Extractor(nn.Module):
    """c + attention(norm(c), norm(x)), then c + FFN(norm(c)), where a depthwise convolution sees each level."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.width, int(config.width * FFN_RATIO)
        self.query_norm, self.norm, self.ffn_norm = (LayerNorm(width) for _ in range(3))
        self.attention = DeformableAttention(width, config.heads, 1, POINTS, VALUE_RATIO)
        self.fc1, self.fc2 = Linear(width, inner), Linear(inner, width)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)

    def forward(self, c_BQD: Tensor, grids: list[Grid], x_BPD: Tensor, grid: Grid) -> Tensor:
        own = centres(grids, c_BQD.device)
        c_BQD = c_BQD + self.attention(self.query_norm(c_BQD), own, self.norm(x_BPD), [grid])
        levels = self.fc1(self.ffn_norm(c_BQD)).split([prod(level) for level in grids], 1)
        seen = [
            self.depthwise(part.transpose(1, 2).unflatten(2, level)).flatten(2).transpose(1, 2)
            for part, level in zip(levels, grids, strict=True)
        ]
        return c_BQD + self.fc2(gelu(torch.cat(seen, 1)))


class Levels(nn.Module):
    """Adds to the tokens of the three coarser maps which level they are of, [B, Q, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(3, width))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat([one.flatten(2).transpose(1, 2) + v for one, v in zip(maps, self.vectors, strict=True)], 1)


class Adapter(Pyramid):
    """Four maps of D channels: the prior's, that have looked at the ViT's patches four times, and these added."""

    def __init__(self, config: ModelConfig, windows: Windows = GLOBAL) -> None:
        super().__init__(config, windows)
        require(
            config.patch_size in (4, 8, 16) and config.layers >= INTERACTIONS,
            f"model.patch_size={config.patch_size}, model.layers={config.layers}: ViT-Adapter takes patches of 16 (or "
            f"8, or 4), to which init_from's are interpolated, and {INTERACTIONS} or more layers",
        )
        self.channels, self.layers = config.width, config.layers
        self.prior = SpatialPrior(config.width, self.strides[0])
        self.levels = Levels(config.width)
        self.injectors = nn.ModuleList([Injector(config) for _ in range(INTERACTIONS)])
        self.extractors = nn.ModuleList([Extractor(config) for _ in range(INTERACTIONS + 2)])
        self.finer = nn.ConvTranspose2d(config.width, config.width, 2, 2)
        self.norms = nn.ModuleList([ChannelNorm(config.width) for _ in range(4)])
        gammas = {f"injectors.{i}.gamma": INJECTED_AT_FIRST for i in range(INTERACTIONS)}
        self.constants = starts_at_zero(self) | gammas

    def maps(self, model: BEiT3, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        images = padded(images, self.strides[-1])
        vit = VisionPass(model, images, keep, self.windows)
        finest, *coarser = self.prior(images.to(vit.dtype))
        grids = [(one.shape[2], one.shape[3]) for one in coarser]
        c_BQD, of_vit, first = self.levels(coarser), [], 0
        for number, injector in enumerate(self.injectors):
            vit.patches = injector(vit.patches, vit.grid, c_BQD, grids)
            last = (number + 1) * self.layers // INTERACTIONS
            vit.run(range(first, last))
            extractors = (
                self.extractors[number:] if number == INTERACTIONS - 1 else self.extractors[number : number + 1]
            )
            for extractor in extractors:
                c_BQD = extractor(c_BQD, grids, vit.patches, vit.grid)
            of_vit.append(vit.map)
            first = last
        parts = zip(c_BQD.split([prod(grid) for grid in grids], 1), grids, strict=True)
        of_levels = [part.transpose(1, 2).unflatten(2, grid) for part, grid in parts]
        levels = [finest + self.finer(of_levels[0]), *of_levels]
        return [
            norm(level + interpolate(x, size=level.shape[2:], mode="bilinear", align_corners=False))
            for norm, level, x in zip(self.norms, levels, of_vit, strict=True)
        ]
