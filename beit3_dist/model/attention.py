"""Multi-head self-attention over the joint sequence of a sample: one softmax over its patches and its words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
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


def _part(joint: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The reverse of `_join`: patches [B * patches, H, d] and packed words [real words, H, d]; either may be empty."""
    patches, words = (part.flatten(0, 1) for part in joint.transpose(1, 2).split([group.patches, group.words], dim=1))
    return patches, words if group.index is None else words.index_select(0, group.index)


def _segments(slices: list[Tensor], layout: Layout) -> list[Tensor]:
    """The four segments of tokens that the slices of one or two experts hold."""
    sizes = list(layout.segments)
    if len(slices) == 1:
        return list(slices[0].split(sizes))
    vision, language = slices
    return [*vision.split(sizes[:2]), *language.split(sizes[2:])]


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], layout: Layout) -> list[Tensor]:
    """softmax(q k' / sqrt(d)) v within each sample.

    q, k, v and the result: the slices [T, H, d] of the experts that projected them, which are never joined: attention
    needs the tokens sample by sample, so that would be one more copy of everything.
    """
    parts = [_segments(slices, layout) for slices in (q, k, v)]
    out = list(parts[0])  # what stays is empty
    for group, patches, words in ((layout.images, 0, None), (layout.pairs, 1, 2), (layout.texts, None, 3)):
        if group.samples == 0:
            continue
        q_BHND, k_BHND, v_BHND = (
            _join(None if patches is None else part[patches], None if words is None else part[words], group)
            for part in parts
        )
        mixed = _part(scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=group.mask), group)
        for segment, part in zip((patches, words), mixed, strict=True):
            if segment is not None:
                out[segment] = part
    return [torch.cat(out)] if len(q) == 1 else [torch.cat(out[:2]), torch.cat(out[2:])]


def _select(slices: list[Tensor], selection: Selection) -> list[Tensor]:
    """The selected tokens of each slice."""
    if len(slices) == 1:
        return [slices[0].index_select(0, selection.rows)]
    vision, language = slices
    of_vision, of_language = selection.rows.split([sum(selection.counts[:2]), sum(selection.counts[2:])])
    return [vision.index_select(0, of_vision), language.index_select(0, of_language - len(vision))]


class Attention(nn.Module):
    """Projections (shared, or one set per modality) around `attend`, with an optional sub-LayerNorm before `out`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = ("shared",) if config.attention == "shared" else ("vision", "language")
        self.head_dim = config.width // config.heads
        linear = lambda: Linear(config.width, config.width)  # noqa: E731
        self.q = Multiway(experts, linear)
        self.k = Multiway(experts, linear)
        self.v = Multiway(experts, linear)
        self.inner_norm = (
            Multiway(experts, lambda: LayerNorm(config.width, config.layer_norm_eps)) if config.sub_layernorm else None
        )
        self.out = Multiway(experts, linear)
        self.attend: Callable[[list[Tensor], list[Tensor], list[Tensor], Layout], list[Tensor]] = (
            attend  # decoding.py puts a cache here
        )

    def forward(
        self, slices: list[Tensor], layout: Layout, selection: Selection | None = None, recompute_core: bool = False
    ) -> list[Tensor]:
        """Each expert's slice of [T, D] -> the same, or of [M, D] for the tokens of `selection`. `recompute_core`:
        `attend` keeps nothing but q, k and v."""
        mixed = self.mix(self.project(slices), layout, recompute_core)
        return self.output(mixed, selection)

    def project(self, slices: list[Tensor]) -> list[list[Tensor]]:
        """q, k and v: each expert's slice [T, H, d]."""
        return [
            [part.unflatten(-1, (-1, self.head_dim)) for part in project.each(slices)]
            for project in (self.q, self.k, self.v)
        ]

    def mix(self, projected: list[list[Tensor]], layout: Layout, recompute: bool) -> list[Tensor]:
        """What `attend` makes of q, k and v. `recompute`: it keeps nothing else."""
        q, k, v = projected
        if recompute:
            return checkpoint(self.attend, q, k, v, layout, use_reentrant=False, preserve_rng_state=False)
        return self.attend(q, k, v, layout)

    def output(self, mixed: list[Tensor], selection: Selection | None) -> list[Tensor]:
        """The output projection of what was mixed: each expert's slice of [T, D] or [M, D]."""
        mixed = [part.flatten(-2) for part in mixed]
        if selection is not None:
            mixed = _select(mixed, selection)
        if self.inner_norm is not None:
            mixed = self.inner_norm.each(mixed)
        return self.out.each(mixed)
