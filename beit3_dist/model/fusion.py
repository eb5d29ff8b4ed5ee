"""Layers that fuse pairs above two encoders: words look at the image, which rests (ALBEF, Li et al. 2021), and at
times both are connected (mPLUG, Li et al. 2022).

    co-attention    w + self-attention(norm w), then w + cross-attention(norm w; norm v), then w + ffn(w); v rests
    connected       [v; w] through an ordinary block with weights in common, and v is added to what it becomes

Pre-norm, but where the model has `post_norm`, as in the papers: w = norm(w + self-attention(w)), and so on. Both take
and give the tokens of pairs alone, [P + W, D]: P patches v of all pairs, then W words w.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.attention import Attention, joined, parted
from beit3_dist.model.block import Block
from beit3_dist.model.cut import cut
from beit3_dist.model.multiway import FeedForward, Multiway, merge
from beit3_dist.model.token_layout import Selection, TokenLayout

WORDS = ("language",)


class CrossAttention(Attention):
    """Words attend to the patches of their pair."""

    kept: list[Tensor] | None = None
    """Keys and values [P, H, d] of patches that are the same in every pass, from the first one on; see decoding.py."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, WORDS)
        of_patches = lambda: cut(Linear(config.width, config.width), weight=0, bias=0)  # noqa: E731
        self.k, self.v = Multiway(("vision",), of_patches), Multiway(("vision",), of_patches)

    def look(self, slices: list[Tensor], layout: TokenLayout, recompute_core: bool = False) -> Tensor:
        """Patches and words [P, D], [W, D] -> [W, D]. `recompute_core`: scores and mixtures are not kept."""
        (patches, words), layout = self.enter(slices, layout)
        (q,) = (part.unflatten(-1, (-1, self.head_dim)) for part in self.q.each([words]))
        k, v = self.kept or (
            part.unflatten(-1, (-1, self.head_dim))
            for projection in (self.k, self.v)
            for part in projection.each([patches])
        )
        if self.kept is not None:
            self.kept[:] = k, v
        sizes_v, sizes_w = layout.pieces
        mixed = [q[:0]]
        parts = zip(layout.groups, q.split(sizes_w), k.split(sizes_v), v.split(sizes_v), strict=True)
        for group, q_part, k_part, v_part in parts:
            if group.patches * group.samples == 0:  # words of no pair
                mixed.append(torch.zeros_like(q_part))
                continue
            q_BHLd, k_BHPd, v_BHPd = (
                joined(None, q_part, group),
                joined(k_part, None, group),
                joined(v_part, None, group),
            )
            mask = None if group.whole or group.mask is None else group.mask[..., -group.words :, : group.patches]
            if recompute_core:
                kept = (q_BHLd, k_BHPd, v_BHPd, mask)
                seen = checkpoint(scaled_dot_product_attention, *kept, use_reentrant=False, preserve_rng_state=False)
            else:
                seen = scaled_dot_product_attention(q_BHLd, k_BHPd, v_BHPd, attn_mask=mask)
            mixed.append(parted(seen, group.of_words)[1])
        return self.leave(self.output([torch.cat(mixed)], None), layout)[0]


class CoAttention(nn.Module):
    """Words see one another and their image, which rests."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = lambda: LayerNorm(config.width, config.layer_norm_eps)  # noqa: E731
        self.attention_norm = Multiway(WORDS, norm)
        self.attention = Attention(config, WORDS)
        self.cross_norm = Multiway(("vision", "language"), norm)
        self.cross_attention = CrossAttention(config)
        self.ffn = Multiway(WORDS, lambda: FeedForward(config))
        self.post_norm = config.post_norm
        for expert in self.ffn.values():
            assert isinstance(expert, FeedForward)
            expert.norms_before = not config.post_norm

    def forward(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        keep_2T: Tensor | None,
        selection: Selection | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Drop path has one draw for both attentions. `recompute`: full is the caller's doing."""
        recompute_core = recompute in ("attention", "selective")
        patches, words = x_TD.split([sum(layout.segments[:2]), sum(layout.segments[2:])])
        keep = (None, None) if keep_2T is None else keep_2T[:, len(patches) :].unbind(0)
        of_self, of_cross, of_ffn = self.attention_norm["language"], self.cross_norm["language"], self._ffn_norm
        branch = self.attention([self._before(of_self, words)], layout.words_alone, recompute_core=recompute_core)
        words = self._behind(of_self, merge(words, branch, keep[0]))
        slices = [self.cross_norm["vision"](patches), self._before(of_cross, words)]
        looked = self.cross_attention.look(slices, layout, recompute_core)
        words = self._behind(of_cross, merge(words, [looked], keep[0]))
        if recompute == "selective":
            branch = checkpoint(self.ffn.each, [words], use_reentrant=False, preserve_rng_state=False)
        else:
            branch = self.ffn.each([words])
        words = self._behind(of_ffn, merge(words, branch, keep[1]))
        return torch.cat([patches, words])

    @property
    def _ffn_norm(self) -> nn.Module:
        expert = self.ffn["language"]
        assert isinstance(expert, FeedForward)
        return expert.norm

    def _before(self, norm: nn.Module, x_TD: Tensor) -> Tensor:
        return x_TD if self.post_norm else norm(x_TD)

    def _behind(self, norm: nn.Module, x_TD: Tensor) -> Tensor:
        return norm(x_TD) if self.post_norm else x_TD


class Connected(Block):
    """Patches and words attend jointly; what the patches were is added once more."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, ("shared",), ("shared",))

    def forward(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        keep_2T: Tensor | None,
        selection: Selection | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        patches = sum(layout.segments[:2])
        became = super().forward(x_TD, layout, keep_2T, None, recompute)
        return torch.cat([x_TD[:patches] + became[:patches], became[patches:]])
