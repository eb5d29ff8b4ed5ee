"""The vision side as a plain backbone for dense prediction: feature maps of images of any size, and ViTDet's pyramid.

A task's head holds a pyramid, and the task asks it for maps:

    self.pyramid = SimplePyramid(config, 256, Windows(16, 4))             # in the head
    maps = model.task_head.pyramid.maps(model, images, keep)              # in losses and predict

`maps`: images [B, 3, H, W], normalised, -> four maps [B, C, H / s, W / s] for s in `pyramid.strides`: 4, 8, 16 and 32
pixels for patches of 16, p / 4 to 2 p for patches of p. Where H or W is not whole in coarsest cells, zeros are added at
the bottom and on the right, and the maps are those of the larger image (`padded`). `keep`: drop-path factors, as of
`BEiT3.encode` (`inputs.keep(inputs.keys)` in a task). Blocks run as in every task: cut over tensor ranks, recomputed by
`activation_checkpointing`, their rates by `layer_decay`. The final norm is left out (`TaskHead.begins_with_norm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from beit3_dist.config import ModelConfig, require
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.token_layout import Group, TokenLayout


@dataclass(frozen=True)
class Windows:
    """Attention within squares of patches, and over the whole image in a few blocks between (ViTDet, Li et al. 2022).

    CLS is left out then, as there. Squares at the bottom and on the right are smaller where an image has no whole
    number of them; ViTDet fills them up with zeros that are attended to.
    """

    side: int = 0
    """Patches of a window's side; 0: all blocks attend to the whole image."""
    global_blocks: int = 4
    """So many blocks attend to the whole image: the last of as many equal parts of the stack."""

    def everywhere(self, layers: int) -> set[int]:
        """The blocks that attend to the whole image."""
        parts = self.global_blocks if self.side else layers
        return {(part + 1) * layers // parts - 1 for part in range(parts)}


GLOBAL = Windows()


def padded(images: Tensor, multiple: int) -> Tensor:
    """Images [B, 3, H, W] with zeros at the bottom and on the right, up to a multiple of pixels."""
    height, width = images.shape[-2:]
    return pad(images, (0, -width % multiple, 0, -height % multiple))


@dataclass(frozen=True)
class _Windowed:
    """The tokens of a micro-batch in the order of their windows."""

    layout: TokenLayout
    order: Tensor
    """int64 [T]: where each token lies in the order of images."""
    back: Tensor
    """int64 [T]: the reverse."""
    images: Tensor
    """int64 [windows]: whose each is."""


def _windowed(batch: int, height: int, width: int, side: int, device: torch.device) -> _Windowed:
    rows = torch.arange(batch * height * width, device=device).view(batch, height, width)
    pieces, groups = [], []
    for strip in rows.split([height - height % side, height % side], 1):
        for part in strip.split([width - width % side, width % side], 2):
            if part.numel():
                h, w = min(side, part.shape[1]), min(side, part.shape[2])
                cells = part.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3)  # [B, rows, columns, h, w]
                pieces.append(cells.reshape(-1, h * w))
                groups.append(Group(len(pieces[-1]), h * w, 0))
    order = torch.cat([piece.flatten() for piece in pieces])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    images = torch.cat([piece[:, 0] for piece in pieces]) // (height * width)
    return _Windowed(TokenLayout(tuple(groups)), order, back, images)


class VisionPass:
    """Images on their way through the vision experts: `run` some blocks, and look at the `map` between them, or change
    it."""

    def __init__(self, model: BEiT3, images: Tensor, keep: Tensor | None, windows: Windows) -> None:
        """`images`: [B, 3, H, W] of whole patches."""
        self._blocks, self._keep = model.blocks, keep
        self.global_blocks = windows.everywhere(model.config.layers)
        self.batch, patch = len(images), model.config.patch_size
        self.grid = (images.shape[2] // patch, images.shape[3] // patch)
        tokens_BND = model.vision_embedding(images, any_size=True)
        self._windowed = None
        if windows.side:
            tokens_BND = tokens_BND[:, 1:]
            self._windowed = _windowed(self.batch, *self.grid, windows.side, images.device)
        self.cls = 0 if windows.side else 1
        self._layout = TokenLayout((Group(self.batch, tokens_BND.shape[1], 0),))
        self._x_TD = tokens_BND.flatten(0, 1)

    def run(self, layers: range) -> None:
        """Through these blocks, one after the other."""
        first = layers.start
        while first < layers.stop:
            whole, last = first in self.global_blocks, first + 1
            while last < layers.stop and (last in self.global_blocks) == whole:
                last += 1
            self._stretch(range(first, last), None if whole else self._windowed)
            first = last

    def _stretch(self, layers: range, windowed: _Windowed | None) -> None:
        if windowed is None:
            self._x_TD = self._blocks(self._x_TD, self._layout, self._keep, layers)
            return
        keep = None if self._keep is None else self._keep.index_select(2, windowed.images)
        x_TD = self._blocks(self._x_TD.index_select(0, windowed.order), windowed.layout, keep, layers)
        self._x_TD = x_TD.index_select(0, windowed.back)

    @property
    def dtype(self) -> torch.dtype:
        """Of what the blocks take."""
        return self._x_TD.dtype

    @property
    def patches(self) -> Tensor:
        """[B, h * w, D]."""
        return self._x_TD.unflatten(0, (self.batch, -1))[:, self.cls :]

    @patches.setter
    def patches(self, patches_BPD: Tensor) -> None:
        cls_BD = self._x_TD.unflatten(0, (self.batch, -1))[:, : self.cls]
        self._x_TD = torch.cat([cls_BD, patches_BPD], 1).flatten(0, 1)

    @property
    def map(self) -> Tensor:
        """[B, D, h, w]."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


def vision_maps(
    model: BEiT3, images: Tensor, after: Sequence[int], keep: Tensor | None = None, windows: Windows = GLOBAL
) -> list[Tensor]:
    """The patches [B, D, h, w] behind each of the blocks `after`, ascending; images [B, 3, H, W] of whole patches."""
    on_its_way, maps, first = VisionPass(model, images, keep, windows), [], 0
    for layer in after:
        on_its_way.run(range(first, layer + 1))
        maps.append(on_its_way.map)
        first = layer + 1
    return maps


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels of each pixel, maps [B, C, H, W]. It stands where others have batch norm, too: no
    picture changes another's result, whatever the layout."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = x_BCHW.movedim(1, -1)
        return super().forward(x_BHWC.flatten(0, 2)).view(x_BHWC.shape).movedim(-1, 1)


class Pyramid(nn.Module):
    """What makes four maps of images."""

    channels: int
    """C of the maps."""
    constants: Mapping[str, float] = {}
    """Names of the parameters that start from a number, for `TaskHead.constants`."""

    def __init__(self, config: ModelConfig, windows: Windows) -> None:
        """Raises ValueError for a model whose patches do not pass all of its blocks."""
        super().__init__()
        require(
            config.fusion_layers == 0,
            f"model.fusion_layers={config.fusion_layers}: dense prediction takes a model whose images pass all layers",
        )
        require(
            config.patch_size % 4 == 0,
            f"model.patch_size={config.patch_size}: the finest map has a quarter of it; give a multiple of 4, as "
            "16, to which init_from's patches are interpolated",
        )
        self.windows, self.last = windows, config.layers - 1
        self.strides = [config.patch_size // 4, config.patch_size // 2, config.patch_size, 2 * config.patch_size]

    def maps(self, model: BEiT3, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        """See above."""
        raise NotImplementedError


class SimplePyramid(Pyramid):
    """ViTDet's: all four levels from the last block's map alone, then a 1 x 1 and a 3 x 3 convolution with norms."""

    def __init__(self, config: ModelConfig, channels: int, windows: Windows = GLOBAL) -> None:
        """`channels`: C of the maps."""
        super().__init__(config, windows)
        self.channels, width = channels, config.width
        half, quarter = width // 2, width // 4
        self.finer = nn.ModuleList([
            nn.Sequential(
                nn.ConvTranspose2d(width, half, 2, 2), ChannelNorm(half), nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ),
            nn.ConvTranspose2d(width, half, 2, 2),
        ])  # fmt: skip
        self.lateral = nn.ModuleList([
            nn.Sequential(
                nn.Conv2d(wide, channels, 1, bias=False), ChannelNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels),
            )
            for wide in (quarter, half, width, width)
        ])  # fmt: skip

    def maps(self, model: BEiT3, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        (last,) = vision_maps(model, padded(images, self.strides[-1]), [self.last], keep, self.windows)
        levels = [self.finer[0](last), self.finer[1](last), last, max_pool2d(last, 2)]
        return [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]


class LayerPyramid(Pyramid):
    """BEiT's for UPerNet: the maps behind a third, a half, two thirds and all of the blocks, brought to the four levels
    by transposed convolutions and pooling; C is D."""

    def __init__(self, config: ModelConfig, windows: Windows = GLOBAL) -> None:
        super().__init__(config, windows)
        self.channels, width = config.width, config.width
        require(config.layers >= 6, f"model.layers={config.layers}: maps are taken behind four of 6 or more")
        self.after = [config.layers * share // 6 - 1 for share in (2, 3, 4, 6)]
        twice = lambda: nn.ConvTranspose2d(width, width, 2, 2)  # noqa: E731
        self.finer = nn.ModuleList([nn.Sequential(twice(), ChannelNorm(width), nn.GELU(), twice()), twice()])

    def maps(self, model: BEiT3, images: Tensor, keep: Tensor | None = None) -> list[Tensor]:
        maps = vision_maps(model, padded(images, self.strides[-1]), self.after, keep, self.windows)
        return [self.finer[0](maps[0]), self.finer[1](maps[1]), maps[2], max_pool2d(maps[3], 2)]
