"""A Multiway block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.attention import Attention
from beit3_dist.model.multiway import FeedForward, Multiway, fork, join, merge
from beit3_dist.model.token_layout import Segments, Selection, TokenLayout


class Block(nn.Module):
    """x + attention(norm(x)), then x + expert(x), with stochastic depth per sample on both branches. Pre-norm, but that
    words of a model with `post_norm` have their norms behind: norm(x + attention(x)), then norm(x + expert(x))."""

    def __init__(self, config: ModelConfig, attention: tuple[str, ...], experts: tuple[str, ...]) -> None:
        """`attention`, `experts`: names of the attention's modules and of the feed-forward networks."""
        super().__init__()
        self.attention_norm = Multiway(attention, lambda: LayerNorm(config.width, config.layer_norm_eps))
        self.attention = Attention(config, attention)
        self.ffn = Multiway(experts, lambda: FeedForward(config))
        self.behind = frozenset({*attention, *experts} - {"vision"}) if config.post_norm else frozenset()
        """Whose norms stand behind the residual connections."""
        for name, expert in self.ffn.items():
            assert isinstance(expert, FeedForward)
            expert.norms_before = name not in self.behind

    def forward(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        keep_2T: Tensor | None,
        selection: Selection | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """[T, D], or [M, D] for the tokens of `selection`: the others then serve as keys and values alone.

        `keep_2T`: factor of each branch for each token (0 where dropped); None keeps all. `recompute`: full is the
        caller's doing.
        """
        recompute_core = recompute in ("attention", "selective")
        x_TD, slices = fork(x_TD, layout.sizes(self.attention_norm.experts))
        if self.behind:
            names = self.attention_norm.experts
            pairs = zip(names, slices, strict=True)
            normed = [part if name in self.behind else self.attention_norm[name](part) for name, part in pairs]
        else:
            normed = self.attention_norm.each(slices)
        branch = self.attention(normed, layout, selection, recompute_core=recompute_core)
        return self.after_attention(x_TD, branch, layout, keep_2T, selection, recompute)

    def after_attention(
        self,
        x_TD: Tensor,
        branch: list[Tensor],
        layout: Segments,
        keep_2T: Tensor | None,
        selection: Selection | None,
        recompute: Recompute,
    ) -> Tensor:
        """The rest of a block whose attention gave `branch`: slices of [T, D] or [M, D]."""
        if selection is not None:
            x_TD, layout = x_TD.index_select(0, selection.rows), selection
            keep_2T = None if keep_2T is None else keep_2T.index_select(1, selection.rows)
        x_TD = merge(x_TD, branch, None if keep_2T is None else keep_2T[0])
        x_TD = self._normed_behind(x_TD, dict(self.attention_norm.items()), layout)
        x_TD, slices = fork(x_TD, layout.sizes(self.ffn.experts))
        if recompute == "selective":
            branch = checkpoint(self.ffn.each, slices, use_reentrant=False, preserve_rng_state=False)
        else:
            branch = self.ffn.each(slices)
        x_TD = merge(x_TD, branch, None if keep_2T is None else keep_2T[1])
        norms: dict[str, Any] = {name: expert.norm for name, expert in self.ffn.items()}
        return self._normed_behind(x_TD, norms, layout)

    def _normed_behind(self, x_TD: Tensor, norms: dict[str, nn.Module], layout: Segments) -> Tensor:
        """x, normed where that comes behind. `norms`: by the names of their slices."""
        if not self.behind:
            return x_TD
        parts = zip(norms.items(), x_TD.split(layout.sizes(tuple(norms))), strict=True)
        return join([norm(part) if name in self.behind else part for (name, norm), part in parts])
