"""Model FLOPs of a step, and the peak rates of devices.

A product of [m, k] and [k, n] counts 2 m k n. Counted are the matrix products of the model at real tokens: experts,
projections, attention scores and mixtures, patch embedding, and heads at masked positions; in pretraining the last
block's experts and output projection run at masked positions too. Under a prefix's mask attention counts 4 D for each
one of the mask, D for scores and D for mixtures, twice: what no kernel can do without, although one that takes any mask
computes the zeros, too. Fine-tuning counts whole squares.
Recomputation, norms, softmax, padding, the image tokenizer, teachers, a moving average that teaches, and the heads of
fine-tuning but captioning's are not. The backward pass costs twice the forward pass: a product has two gradients, of
weights and of inputs. Where parameters are frozen, those that autograd does not need are not counted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.model.encoder import experts_of, kind_of
from beit3_dist.model.multiway import modules_of
from beit3_dist.model.token_layout import Segments
from beit3_dist.objectives.together import Objectives

PEAK_BF16 = {  # dense bf16 tensor FLOP/s, from NVIDIA's data sheets, without sparsity
    "H200 NVL": 835.5e12,
    "H100 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 rate of the device, or None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "PCIe" in name and ("H100" in name or "H800" in name):  # 114 instead of 132 multiprocessors at lower clocks
        return 756e12
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


@dataclass(frozen=True)
class Unseen:
    """Zeros in the masks of a micro-batch's samples: pairs of a query and a key that it does not see."""

    captions: int = 0
    """Between words of a caption."""
    patches: int = 0
    """Patches' queries (CLS is one) and keys of their captions' words."""
    texts: int = 0
    """Between words of a text."""

    @classmethod
    def under_prefix(cls, patches: int, lengths: Tensor, prefixes: Tensor) -> Unseen:
        """By `prefix_mask`: of each sample [B] the keys after the prefix lie behind the queries of its patches (0: a
        text) and of the prefix, and each of them behind those of the words before it."""
        after = lengths - prefixes
        words = int((prefixes * after + after * (after - 1) // 2).sum())
        return cls(captions=words, patches=patches * int(after.sum())) if patches else cls(texts=words)

    def __add__(self, other: Unseen) -> Unseen:
        return Unseen(self.captions + other.captions, self.patches + other.patches, self.texts + other.texts)

    @property
    def total(self) -> int:
        """Where the tokens of a pair attend to one another."""
        return self.captions + self.patches + self.texts


NOTHING_UNSEEN = Unseen()


def encoder_flops(
    config: ModelConfig,
    images: int,
    caption_lengths: Tensor,
    text_lengths: Tensor,
    read: int | None = None,
    unseen: Unseen = NOTHING_UNSEEN,
) -> int:
    """FLOPs of forward and backward of one micro-batch on one rank, heads left out.

    caption_lengths [P], text_lengths [T]: int64, words of the pairs and texts; `images`: those alone. `read`: tokens
    that are read after the last block, which computes no others; None: all, as in fine-tuning. `unseen`: what masks
    part.
    """
    d, f = config.width, config.ffn_width
    pairs, patches = len(caption_lengths), 1 + config.patches
    embedding = _patch_embedding(config, images + pairs)
    if config.fusion_layers:
        return 3 * (_fusion_flops(config, images, caption_lengths, text_lengths, unseen) + embedding)
    tokens = (images + pairs) * patches + int(caption_lengths.sum()) + int(text_lengths.sum())
    lengths = torch.cat([torch.full((images,), patches), patches + caption_lengths, text_lengths])
    attention = 4 * d * (int(lengths.square().sum()) - unseen.total)
    block = tokens * (8 * d * d + 4 * d * f) + attention
    last = tokens * 6 * d * d + attention + (tokens if read is None else read) * (2 * d * d + 4 * d * f)
    return 3 * ((config.layers - 1) * block + last + embedding)


def _patch_embedding(config: ModelConfig, images: int) -> int:
    """Forward, of the product of all pixels and the patches' projection."""
    width = config.vision_width or config.width
    return 2 * images * config.patches * 3 * config.patch_size**2 * width


def _block(config: ModelConfig, tokens: int, keys: int) -> int:
    """Forward, of a block. `keys`: pairs of a query and a key."""
    d, f = config.width, config.ffn_width
    return tokens * (8 * d * d + 4 * d * f) + 4 * d * keys


def _fusion_flops(
    config: ModelConfig, images: int, caption_lengths: Tensor, text_lengths: Tensor, unseen: Unseen
) -> int:
    """Forward, of the blocks of a model with fusion layers: each takes the tokens that do not rest in it."""
    d, block = config.width, partial(_block, config)
    pairs, patches, captions = len(caption_lengths), 1 + config.patches, int(caption_lengths.sum())

    def squares(lengths: Tensor) -> int:
        return int(lengths.square().sum())

    tokens_and_keys = (images + pairs) * patches, (images + pairs) * patches**2
    of_images = block(*tokens_and_keys)
    words = torch.cat([caption_lengths, text_lengths])
    of_words = block(int(words.sum()), squares(words) - unseen.captions - unseen.texts)
    cross = 4 * d * d * (captions + pairs * patches) + 4 * d * patches * captions
    cost = {
        "images": of_images,
        "words": of_words,
        "alone": of_images + of_words,
        "co_attention": block(captions, squares(caption_lengths) - unseen.captions) + cross,
        "connected": block(
            pairs * patches + captions, squares(patches + caption_lengths) - unseen.captions - unseen.patches
        ),
    }
    layers = sum(cost[kind_of(config, layer)] for layer in range(config.layers))
    if config.vision_layers == 0:
        return layers
    of_vision = config.vision_layers * _block(config.of_vision, *tokens_and_keys)
    return layers + of_vision + 2 * tokens_and_keys[0] * config.vision_width * d


@dataclass(frozen=True)
class _Tokens(Segments):
    """Numbers of tokens alone."""

    counts: tuple[int, int, int, int]

    @property
    def segments(self) -> tuple[int, int, int, int]:
        return self.counts


def pretraining_flops(
    objectives: Objectives,
    images: int,
    caption_lengths: Tensor,
    text_lengths: Tensor,
    read: tuple[int, int, int, int],
    counts: list[int],
    unseen: Unseen = NOTHING_UNSEEN,
) -> int:
    """As `encoder_flops`, with the heads at `counts` [K] targets, and without what frozen parameters spare. `read`: of
    each segment."""
    model = objectives.model
    flops = encoder_flops(model, images, caption_lengths, text_lengths, sum(read), unseen)
    flops += round(3 * objectives.head_flops(counts))
    if objectives.trained is None or model.fusion_layers:  # of whose blocks nothing is frozen
        return flops
    patches, pairs = 1 + model.patches, len(caption_lengths)
    lengths = torch.cat([torch.full((images,), patches), patches + caption_lengths, text_lengths])
    segments = (images * patches, pairs * patches, int(caption_lengths.sum()), int(text_lengths.sum()))
    products = 2 * model.width * (int(lengths.square().sum()) - unseen.total)
    spared = _Spared(model, objectives.trained, _Tokens(segments), _Tokens(read), products)
    embedding = _patch_embedding(model, images + pairs)
    return flops - spared.embedding(embedding) - spared.blocks() - spared.heads(objectives.head_products(counts))


class _Spared:
    """The products of a backward pass that nobody needs: gradients of frozen weights, and of inputs that depend on
    nothing trained. As exact as autograd, but that attention is taken to be one operation over all samples."""

    def __init__(
        self, model: ModelConfig, trained: Collection[str], tokens: Segments, read: Segments, products: int
    ) -> None:
        """`read`: tokens of the last block behind attention. `products`: FLOPs of the scores, and of the mixtures."""
        self._model, self._trained, self._tokens, self._read, self._products = model, trained, tokens, read, products
        self._flows = False
        """Whether a gradient is needed here, walking from the pixels upwards."""

    def _learns(self, beginning: str) -> bool:
        return any(name.startswith(beginning) for name in self._trained)

    def _product(self, name: str, flops: int, needed: bool) -> tuple[int, bool]:
        """What the linear layer `name` is spared, whose input's gradient is `needed`, and whether its output's is."""
        spared = flops * ((not needed) + (f"{name}.weight" not in self._trained))
        return spared, needed or self._learns(f"{name}.")

    def embedding(self, pixels: int) -> int:
        """`pixels`: FLOPs of the patches' projection."""
        self._flows = self._learns("vision_embedding.") or self._learns("language_embedding.")
        return 2 * pixels * ("vision_embedding.projection.weight" not in self._trained)

    def blocks(self) -> int:
        return sum(self._block(number) for number in range(self._model.layers))

    def _block(self, number: int) -> int:
        config, spared, block = self._model, 0, f"blocks.{number}"
        d, f = config.width, config.ffn_width
        behind = self._read if number == config.layers - 1 else self._tokens
        sides = modules_of(config.attention)
        projected = dict.fromkeys("qkv", False)
        for side, tokens in zip(sides, self._tokens.sizes(sides), strict=True):
            needed = self._flows or self._learns(f"{block}.attention_norm.{side}.")
            for part in projected:
                less, learns = self._product(f"{block}.attention.{part}.{side}", 2 * tokens * d * d, needed)
                spared, projected[part] = spared + less, projected[part] or learns
        of_queries, of_keys, of_values = projected.values()
        without = (not (of_queries or of_keys)) + (not of_queries) + (not of_keys) + (not of_values)
        spared += self._products * without
        flows = self._flows
        for side, tokens in zip(sides, behind.sizes(sides), strict=True):
            needed = any(projected.values()) or self._learns(f"{block}.attention.inner_norm.{side}.")
            less, learns = self._product(f"{block}.attention.out.{side}", 2 * tokens * d * d, needed)
            spared, flows = spared + less, flows or learns
        self._flows = flows
        experts = experts_of(config, number)
        for expert, tokens in zip(experts, behind.sizes(experts), strict=True):
            ffn, needed = f"{block}.ffn.{expert}", self._flows or self._learns(f"{block}.ffn.{expert}.norm.")
            for layer in ("fc1", "fc2"):
                less, needed = self._product(f"{ffn}.{layer}", 2 * tokens * d * f, needed)
                spared, needed = spared + less, needed or self._learns(f"{ffn}.inner_norm.")
            flows = flows or needed
        self._flows = flows
        return spared

    def heads(self, products: list[tuple[str, float]]) -> int:
        """`products`: how the names of heads' parameters begin, and the FLOPs of their products, forward."""
        needed = self._flows or self._learns("norm.")
        return int(sum(flops * ((not needed) + (not self._learns(head))) for head, flops in products))
