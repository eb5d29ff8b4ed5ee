"""Where a model looks: the attention of a layer, as a picture over the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3_dist.config import require
from beit3_dist.inference import ImageLike, Model, open_image
from beit3_dist.model.attention import Attention, attend, joined
from beit3_dist.model.fusion import CoAttention, Connected
from beit3_dist.model.token_layout import TokenLayout
from beit3_dist.model.vision_tower import VisionTower

SIDE = 448
"""Pixels of the picture's side."""
WARM = np.array([255.0, 120.0, 0.0])
"""Colour of what is looked at."""


def layers_that_look(model: Model, words: bool) -> list[Attention]:
    """The attentions that look at patches, the lowest first: of CLS, or of a text's `words`. Layers of fusion are where
    words look; below them, and in an image encoder of its own width, images are alone."""
    network = model.network
    blocks: dict[str, Any] = {**network.blocks}
    if not network.config.fusion_layers:
        return [block.attention for block in blocks.values()]
    if words:
        above = [block for block in blocks.values() if isinstance(block, CoAttention | Connected)]
        return [block.cross_attention if isinstance(block, CoAttention) else block.attention for block in above]
    if isinstance(network.vision_embedding, VisionTower):
        blocks = {**network.vision_embedding.blocks}
        return [block.attention for block in blocks.values()]
    return [block.attention for layer, block in blocks.items() if network.blocks.kinds[layer] in ("alone", "images")]


def _shares(q_BHQd: Tensor, k_BHKd: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys, [B, H, Q, K]."""
    scores = q_BHQd @ k_BHKd.transpose(2, 3) / q_BHQd.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


@contextmanager
def _recorded(attention: Attention, found: list[Tensor]) -> Iterator[None]:
    """Inside, the attention of the one group that the model encodes is kept: [B, H, N, N], or [B, H, words, CLS and
    patches] where words look at an image that rests."""

    def recording(q: list[Tensor], k: list[Tensor], v: list[Tensor], layout: TokenLayout) -> list[Tensor]:
        (group,) = layout.groups
        patches = group.samples * group.patches

        def of_sample(slices: list[Tensor]) -> Tensor:
            tokens = torch.cat(slices)
            return joined(tokens[:patches], tokens[patches:] if group.words else None, group)

        found.append(_shares(of_sample(q), of_sample(k), group.mask))
        return attend(q, k, v, layout)

    def looking(slices: list[Tensor], layout: TokenLayout, recompute_core: bool = False) -> Tensor:
        (group,), (patches, words) = layout.groups, slices
        (q,), (k,) = attention.q.each([words]), attention.k.each([patches])
        q, k = (part.unflatten(-1, (-1, attention.head_dim)) for part in (q, k))
        found.append(_shares(joined(None, q, group), joined(k, None, group), None))
        return look(slices, layout, recompute_core)

    look: Any = getattr(attention, "look", None)
    with patch.object(attention, *(("attend", recording) if look is None else ("look", looking))):
        yield


@torch.inference_mode()
def attention_over(model: Model, image: ImageLike, text: str = "", layer: int = -1) -> Tensor:
    """How much CLS attends to each patch in a layer, the mean over the heads; with a text, how much its words do, the
    mean over them, too. fp32 [patches], which sum up to 1. `layer`: of `layers_that_look`. Raises ValueError for one
    that there is not."""
    layers, patches, found = layers_that_look(model, bool(text)), model.network.config.patches, list[Tensor]()
    require(-len(layers) <= layer < len(layers), f"layer {layer}: {len(layers)} look at patches")
    with _recorded(layers[layer], found):
        words, padding = model._words([text]) if text else (None, None)
        model.network.encode(model._square([image]), words, padding)
    rows = found[0][0].float().mean(0)  # of all tokens, or of words alone
    looked = rows[:1] if words is None else rows[-words.shape[1] :]
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
