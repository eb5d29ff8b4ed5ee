"""A Multiway block and the stack of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.attention import Attention
from beit3_dist.model.multiway import FeedForward, Multiway, fork, merge, modules_of
from beit3_dist.model.token_layout import Segments, Selection, TokenLayout


class Block(nn.Module):
    """x + attention(norm(x)), then x + expert(x); pre-norm, with stochastic depth per sample on both branches."""

    def __init__(self, config: ModelConfig, has_vl_expert: bool) -> None:
        super().__init__()
        experts = ("vision", "vl", "language") if has_vl_expert else modules_of(config.ffn)
        norms = modules_of(config.attention)
        self.attention_norm = Multiway(norms, lambda: LayerNorm(config.width, config.layer_norm_eps))
        self.attention = Attention(config)
        self.ffn = Multiway(experts, lambda: FeedForward(config))

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
        branch = self.attention(self.attention_norm.each(slices), layout, selection, recompute_core=recompute_core)
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
        x_TD, slices = fork(x_TD, layout.sizes(self.ffn.experts))
        if recompute == "selective":
            branch = checkpoint(self.ffn.each, slices, use_reentrant=False, preserve_rng_state=False)
        else:
            branch = self.ffn.each(slices)
        return merge(x_TD, branch, None if keep_2T is None else keep_2T[1])


class Encoder(nn.ModuleDict):
    """The stack of blocks under their numbers; the top `vl_expert_layers` have a vision-language expert.

    A dictionary and not a list, so that a pipeline stage can leave out blocks and the others keep their names. `enter`
    and `leave` are where sequence parallelism shares out the tokens; without it they change nothing.
    """

    enter: Callable[[Tensor, Any, Any], tuple[Tensor, Any, Any]] = staticmethod(lambda *inputs: inputs)
    """(x [T, D], layout, selection) -> what the blocks take."""
    leave: Callable[[Tensor, Any], Tensor] = staticmethod(lambda x_TD, layout: x_TD)
    """(the last block's output, the layout that `enter` gave) -> the output."""

    def __init__(self, config: ModelConfig) -> None:
        first_vl = config.layers - config.vl_expert_layers
        super().__init__({str(layer): Block(config, layer >= first_vl) for layer in range(config.layers)})
        self.recompute: Recompute = "none"
        self.recompute_every = 1
        self.last = str(config.layers - 1)

    def forward(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        keep_L2S: Tensor | None,
        layers: range | None = None,
        selection: Selection | None = None,
    ) -> Tensor:
        """[T, D], or [M, D] for the tokens of `selection`: the last block then computes no others.

        `keep_L2S`: factors of `drop_path_factors` per layer, branch and sample; None in evaluation. `layers`: a
        pipeline stage's; None: all.
        """
        x_TD, layout, selection = self.enter(x_TD, layout, selection)
        keep_L2T = None if keep_L2S is None else keep_L2S[:, :, layout.token_samples(x_TD.device)].to(x_TD.dtype)
        for layer, block in self.items():
            if layers is not None and int(layer) not in layers:
                continue
            keep_2T = None if keep_L2T is None else keep_L2T[int(layer)]
            wanted = selection if layer == self.last else None
            recompute = self.recompute if self.training and int(layer) % self.recompute_every == 0 else "none"
            if recompute == "full":
                # Nothing in a block draws from a generator, so there is no state to restore on recompute.
                x_TD = checkpoint(
                    block, x_TD, layout, keep_2T, wanted, recompute, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_TD = block(x_TD, layout, keep_2T, wanted, recompute)
        return self.leave(x_TD, layout)
