"""Patches and words become vectors: content plus the position within their own modality.

Positions start at 2 in both tables, as in the released models; rows 0 and 1 are unused.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.cut import cut

FIRST_POSITION = 2


def resampled_positions(patches: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Vectors of the patches of a square grid, [g * g, D], for a grid of another size: [height * width, D], in their
    precision. Resampled as an image, by `mode` with `align_corners=False`, in float32, as unilm's fine-tuning code and
    ViTDet do it."""
    side = isqrt(len(patches))
    if (side, side) == (height, width):
        return patches
    image = patches.float().T.reshape(1, -1, side, side)
    resampled = interpolate(image, size=(height, width), mode=mode, align_corners=False)
    return resampled.flatten(2)[0].T.to(patches.dtype)


class VisionEmbedding(nn.Module):
    """Images [B, 3, S, S] -> CLS and patches [B, 1 + patches, D]; masked patches become the mask token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.image_size = config.image_size
        self.projection = Linear(3 * config.patch_size**2, config.width)
        self.cls_token = nn.Parameter(torch.empty(config.width))
        self.mask_token = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(FIRST_POSITION + 1 + config.patches, config.width))

    def forward(self, images: Tensor, image_mask: Tensor | None = None, any_size: bool = False) -> Tensor:
        """`image_mask`: bool [B, patches], True where the patch is hidden. CLS is never masked. `any_size`: images
        [B, 3, H, W] of whole patches are taken, and positions are resampled to their grid."""
        batch, _, height, width = images.shape
        if (height, width) != (self.image_size, self.image_size) and not any_size:
            raise ValueError(f"images are {height} x {width} pixels, model.image_size is {self.image_size}")
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        # A stride-p convolution is a matrix product of flattened patches: [B, h, w, 3, p, p] -> [B, h * w, 3 p p].
        pixels = images.reshape(batch, 3, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches = self.projection(pixels.to(self.projection.weight.dtype))
        if image_mask is not None:
            patches = torch.where(image_mask[..., None], self.mask_token, patches)
        x = torch.cat([self.cls_token.expand(batch, 1, -1), patches], dim=1)
        if (height, width) == (self.image_size, self.image_size):
            return x + self.positions[FIRST_POSITION:]
        cls, patches = self.positions[FIRST_POSITION:].split([1, len(self.positions) - FIRST_POSITION - 1])
        return x + torch.cat([cls, resampled_positions(patches, rows, columns)])


class LanguageEmbedding(nn.Module):
    """Word ids [W] and their positions in their texts [W] -> [W, D], behind a norm where the model has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.words = cut(nn.Embedding(config.vocab_size, config.width), weight=0)
        self.positions = nn.Parameter(torch.empty(FIRST_POSITION + config.max_text_length, config.width))
        self.norm = LayerNorm(config.width, config.layer_norm_eps) if config.word_norm else None

    def forward(self, words: Tensor, positions: Tensor) -> Tensor:
        x_WD = self.words(words) + embedding(FIRST_POSITION + positions, self.positions)
        return x_WD if self.norm is None else self.norm(x_WD)
