"""Multi-head self-attention over the joint sequence of a sample: one softmax over its patches and its words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.layout import Group, Layout
from beit3_dist.model.multiway import Multiway


def _pad(words: Tensor, group: Group) -> Tensor:
    """Packed words [real words, H, d] -> [B, words, H, d], zeros at padding."""
    if group.index is not None:
        padded = words.new_zeros(group.samples * group.words, *words.shape[1:])
        words = padded.index_copy(0, group.index, words)
    return words.reshape(group.samples, group.words, *words.shape[1:])


def _unpad(words: Tensor, group: Group) -> Tensor:
    """[B, words, H, d] -> packed words [real words, H, d]."""
    words = words.flatten(0, 1)
    return words if group.index is None else words.index_select(0, group.index)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """softmax(q k' / sqrt(d)) v within each sample; q, k, v and the result are [T, H, d] in the layout's order."""
    segments = [t.split(list(layout.segments)) for t in (q, k, v)]
    out: list[Tensor] = []
    groups = ((layout.images, 0, None), (layout.pairs, 1, 2), (layout.texts, None, 3))
    for group, patch_segment, word_segment in groups:
        if group.samples == 0:
            continue
        joint = []  # q, k, v as [B, H, N, d]
        for parts in segments:
            pieces = []
            if patch_segment is not None:
                patches = parts[patch_segment]
                pieces.append(patches.reshape(group.samples, group.patches, *patches.shape[1:]))
            if word_segment is not None:
                pieces.append(_pad(parts[word_segment], group))
            joint.append((pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).transpose(1, 2))
        mixed = scaled_dot_product_attention(*joint, attn_mask=group.mask).transpose(1, 2)  # [B, N, H, d]
        if patch_segment is not None:
            out.append(mixed[:, :group.patches].flatten(0, 1))
        if word_segment is not None:
            out.append(_unpad(mixed[:, group.patches:], group))
    return torch.cat(out)


class Attention(nn.Module):
    """Projections (shared, or one set per modality) around `attend`, with an optional sub-LayerNorm before `out`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = ("shared",) if config.attention == "shared" else ("vision", "language")
        self.heads = config.heads
        linear = lambda: nn.Linear(config.width, config.width)  # noqa: E731
        self.q = Multiway(experts, linear)
        self.k = Multiway(experts, linear)
        self.v = Multiway(experts, linear)
        self.inner_norm = (Multiway(experts, lambda: LayerNorm(config.width, config.layer_norm_eps))
                           if config.sub_layernorm else None)
        self.out = Multiway(experts, linear)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        q, k, v = (project(x_TD, layout).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v))
        mixed_TD = attend(q, k, v, layout).flatten(-2)
        if self.inner_norm is not None:
            mixed_TD = self.inner_norm(mixed_TD, layout)
        return self.out(mixed_TD, layout)
