"""Multi-head self-attention over the joint sequence of a sample: one softmax over its patches and its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.cut import cut
from beit3_dist.model.multiway import Multiway
from beit3_dist.model.token_layout import Group, Selection, TokenLayout


def joined(patches: Tensor | None, words: Tensor | None, group: Group) -> Tensor:
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


def parted(joint: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The reverse of `joined`: patches [B * patches, H, d] and packed words [real words, H, d]; either may be empty."""
    patches, words = (part.flatten(0, 1) for part in joint.transpose(1, 2).split([group.patches, group.words], dim=1))
    return patches, words if group.index is None else words.index_select(0, group.index)


def _pieces(slices: list[Tensor], layout: TokenLayout) -> tuple[list[Tensor], list[Tensor]]:
    """The patches and the words of each group that has some, out of the slices of one or two experts."""
    patches, words = layout.pieces
    if len(slices) == 1:
        pieces = slices[0].split([*patches, *words])
        return list(pieces[: len(patches)]), list(pieces[len(patches) :])
    vision, language = slices
    return list(vision.split(patches)) if patches else [], list(language.split(words)) if words else []


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], layout: TokenLayout) -> list[Tensor]:
    """softmax(q k' / sqrt(d)) v within each sample.

    q, k, v and the result: the slices [T, H, d] of the experts that projected them, which are never joined: attention
    needs the tokens sample by sample, so that would be one more copy of everything.
    """
    parts = [_pieces(slices, layout) for slices in (q, k, v)]
    patches, words = list(parts[0][0]), list(parts[0][1])  # what stays is empty
    first_words = len(patches) - sum(group.fused for group in layout.groups)  # groups without words come first
    for number, group in enumerate(layout.groups):
        if group.samples * (group.patches + group.words) == 0:
            continue
        of_patches = number if group.kind < 2 else None
        of_words = number - first_words if group.kind > 0 else None
        q_BHND, k_BHND, v_BHND = (
            joined(None if of_patches is None else p[of_patches], None if of_words is None else w[of_words], group)
            for p, w in parts
        )
        mixed = parted(scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=group.mask), group)
        if of_patches is not None:
            patches[of_patches] = mixed[0]
        if of_words is not None:
            words[of_words] = mixed[1]
    if len(q) == 1:
        return [torch.cat([*patches, *words])] if layout.groups else q
    return [torch.cat(some) if some else empty for some, empty in zip((patches, words), q, strict=True)]


def _select(slices: list[Tensor], selection: Selection) -> list[Tensor]:
    if len(slices) == 1:
        return [slices[0].index_select(0, selection.rows)]
    vision, language = slices
    of_vision, of_language = selection.rows.split([sum(selection.counts[:2]), sum(selection.counts[2:])])
    return [vision.index_select(0, of_vision), language.index_select(0, of_language - len(vision))]


class Attention(nn.Module):
    """Projections (one set, or one for each modality) around `attend`, with an optional sub-LayerNorm before `out`.

    `enter` and `leave` are where tensor parallelism communicates; without it they change nothing.
    """

    enter: Callable[[list[Tensor], Any], tuple[list[Tensor], Any]] = staticmethod(
        lambda slices, layout: (slices, layout)
    )
    """(the experts' slices [T, D], the layout) -> both as the projections take them."""
    leave: Callable[[list[Tensor], Any], list[Tensor]] = staticmethod(lambda slices, layout: slices)
    """(the experts' slices of the output, the layout that `enter` gave) -> the slices."""

    def __init__(self, config: ModelConfig, experts: tuple[str, ...]) -> None:
        super().__init__()
        self.head_dim = config.width // config.heads
        width, eps = config.width, config.layer_norm_eps
        heads_of_rank = lambda: cut(Linear(width, width), weight=0, bias=0)  # noqa: E731
        self.q = Multiway(experts, heads_of_rank)
        self.k = Multiway(experts, heads_of_rank)
        self.v = Multiway(experts, heads_of_rank)
        inner_norm = lambda: cut(LayerNorm(width, eps), weight=0, bias=0)  # noqa: E731
        self.inner_norm = Multiway(experts, inner_norm) if config.sub_layernorm else None
        self.out = Multiway(experts, lambda: cut(Linear(width, width), weight=1))
        self.attend: Callable[[list[Tensor], list[Tensor], list[Tensor], TokenLayout], list[Tensor]] = (
            attend  # decoding.py puts a cache here
        )

    def forward(
        self,
        slices: list[Tensor],
        layout: TokenLayout,
        selection: Selection | None = None,
        recompute_core: bool = False,
    ) -> list[Tensor]:
        """Each expert's slice of [T, D] -> the same, or of [M, D] for the tokens of `selection`. `recompute_core`:
        `attend` keeps nothing but q, k and v."""
        slices, layout = self.enter(slices, layout)
        mixed = self.mix(self.project(slices), layout, recompute_core)
        return self.leave(self.output(mixed, selection), layout)

    def project(self, slices: list[Tensor]) -> list[list[Tensor]]:
        """q, k and v: each expert's slice [T, H, d]."""
        return [
            [part.unflatten(-1, (-1, self.head_dim)) for part in project.each(slices)]
            for project in (self.q, self.k, self.v)
        ]

    def mix(self, projected: list[list[Tensor]], layout: TokenLayout, recompute: bool) -> list[Tensor]:
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
