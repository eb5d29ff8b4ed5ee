"""Where a model looks: the attention of a layer, as a picture over the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3_dist.config import require
from beit3_dist.inference import ImageLike, Model, open_image
from beit3_dist.model.attention import Attention, attend, joined
from beit3_dist.model.token_layout import TokenLayout

SIDE = 448
"""Pixels of the picture's side."""
WARM = np.array([255.0, 120.0, 0.0])
"""Colour of what is looked at."""


@contextmanager
def _recorded(attention: Attention, found: list[Tensor]) -> Iterator[None]:
    """Inside, the attention of the one group that the model encodes is kept: [B, H, N, N]."""

    def recording(q: list[Tensor], k: list[Tensor], v: list[Tensor], layout: TokenLayout) -> list[Tensor]:
        (group,) = layout.groups
        patches = group.samples * group.patches

        def of_sample(slices: list[Tensor]) -> Tensor:
            tokens = torch.cat(slices)
            return joined(tokens[:patches], tokens[patches:] if group.words else None, group)

        q_BHND, k_BHND = of_sample(q), of_sample(k)
        scores = q_BHND @ k_BHND.transpose(2, 3) / q_BHND.shape[-1] ** 0.5
        if group.mask is not None:
            scores = scores.masked_fill(~group.mask, -torch.inf)
        found.append(scores.softmax(-1))
        return attend(q, k, v, layout)

    before = attention.attend
    attention.attend = recording
    try:
        yield
    finally:
        attention.attend = before


def no_attention(model: Model) -> str:
    """Why the attention of a model is not drawn; empty where it is."""
    config = model.network.config
    if config.fusion_layers or config.vision_layers:
        return f"{model.name} fuses image and text in layers of their own, whose attention is not drawn"
    return ""


@torch.inference_mode()
def attention_over(model: Model, image: ImageLike, text: str = "", layer: int = -1) -> Tensor:
    """How much CLS attends to each patch in a layer, the mean over the heads; with a text, how much its words do, the
    mean over them, too. fp32 [patches], which sum up to 1. Raises ValueError for a layer that there is not."""
    if reason := no_attention(model):
        raise ValueError(reason)
    blocks = [module for module in model.network.blocks.modules() if isinstance(module, Attention)]
    require(-len(blocks) <= layer < len(blocks), f"layer {layer}: the model has {len(blocks)}")
    patches, found = model.network.config.patches, list[Tensor]()
    with _recorded(blocks[layer], found):
        words, padding = model._words([text]) if text else (None, None)
        model.network.encode(model._square([image]), words, padding)
    rows = found[0][0].float().mean(0)  # [N, N]
    looked = rows[1 + patches :] if text else rows[:1]
    over = looked[:, 1 : 1 + patches].mean(0).cpu()
    return over / over.sum()


def attention_picture(model: Model, image: ImageLike, text: str = "", layer: int = -1) -> Image.Image:
    """The square that the model sees, the more orange the more a patch is attended to (`attention_over`)."""
    over = attention_over(model, image, text, layer)
    grid = int(len(over) ** 0.5)
    heat = Image.fromarray((255 * over / over.max()).byte().view(grid, grid).numpy())
    share = np.asarray(heat.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    opened = open_image(image)
    side = min(opened.size)
    left, top = (opened.width - side) // 2, (opened.height - side) // 2
    shown = opened.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    mixed = np.asarray(shown) * (1 - 0.7 * share) * (0.5 + 0.5 * share) + 0.7 * share * WARM
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
