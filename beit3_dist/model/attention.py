"""Multi-head self-attention over the joint sequence of a sample: one softmax over its patches and its words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.layout import Group, Layout, Selection
from beit3_dist.model.multiway import Multiway


def _join(patches: Tensor | None, words: Tensor | None, group: Group) -> Tensor:
    """Patches [B * patches, H, d] and packed words [real words, H, d] -> [B, H, N, d], zeros at padding."""
    pieces = []
    if patches is not None:
        pieces.append(patches.reshape(group.samples, group.patches, *patches.shape[1:]))
    if words is not None:
        if group.index is not None:
            padded = words.new_zeros(group.samples * group.words, *words.shape[1:])
            words = padded.index_copy(0, group.index, words)
        pieces.append(words.reshape(group.samples, group.words, *words.shape[1:]))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).transpose(1, 2)


def _part(joint: Tensor, group: Group) -> list[Tensor]:
    """The reverse of `_join`: the non-empty ones of patches [B * patches, H, d] and packed words [real words, H, d]."""
    patches, words = (part.flatten(0, 1) for part in joint.transpose(1, 2).split([group.patches, group.words], dim=1))
    if group.index is not None:
        words = words.index_select(0, group.index)
    return [part for part in (patches, words) if len(part)]


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """softmax(q k' / sqrt(d)) v within each sample; q, k, v and the result are [T, H, d] in the layout's order."""
    parts = [tensor.split(list(layout.segments)) for tensor in (q, k, v)]
    out: list[Tensor] = []
    for group, patches, words in ((layout.images, 0, None), (layout.pairs, 1, 2), (layout.texts, None, 3)):
        if group.samples == 0:
            continue
        q_BHND, k_BHND, v_BHND = (
            _join(None if patches is None else part[patches], None if words is None else part[words], group)
            for part in parts
        )
        out += _part(scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=group.mask), group)
    return torch.cat(out)


class Attention(nn.Module):
    """Projections (shared, or one set per modality) around `attend`, with an optional sub-LayerNorm before `out`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = ("shared",) if config.attention == "shared" else ("vision", "language")
        self.head_dim = config.width // config.heads
        linear = lambda: nn.Linear(config.width, config.width)  # noqa: E731
        self.q = Multiway(experts, linear)
        self.k = Multiway(experts, linear)
        self.v = Multiway(experts, linear)
        self.inner_norm = (
            Multiway(experts, lambda: LayerNorm(config.width, config.layer_norm_eps)) if config.sub_layernorm else None
        )
        self.out = Multiway(experts, linear)
        self.attend: Callable[[Tensor, Tensor, Tensor, Layout], Tensor] = attend  # decoding.py puts a cache here

    def forward(self, x_TD: Tensor, layout: Layout, selection: Selection | None = None) -> Tensor:
        """[T, D], or [M, D] for the tokens of `selection`."""
        q, k, v = (project(x_TD, layout).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        mixed_TD = self.attend(q, k, v, layout).flatten(-2)
        if selection is not None:
            assert selection.rows is not None
            mixed_TD, layout = mixed_TD.index_select(0, selection.rows), selection
        if self.inner_norm is not None:
            mixed_TD = self.inner_norm(mixed_TD, layout)
        return self.out(mixed_TD, layout)
