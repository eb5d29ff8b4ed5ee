"""The stack of blocks, and which tokens each of them takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.model.block import Block
from beit3_dist.model.fusion import WORDS, CoAttention, Connected
from beit3_dist.model.multiway import modules_of
from beit3_dist.model.token_layout import Selection, TokenLayout

Kind = Literal["joint", "alone", "images", "words", "co_attention", "connected"]


def kind_of(config: ModelConfig, layer: int) -> Kind:
    """What a layer does: joint, attention over all of a sample's tokens; alone, over each modality by itself; images or
    words, the same of these, while the others rest; co_attention and connected, fusion of pairs, while all others rest.
    """
    if config.fusion_layers == 0:
        return "joint"
    above = layer - config.lower_layers
    if above >= 0:
        every = config.connected_every + 1
        return "connected" if every > 1 and above % every == every - 1 else "co_attention"
    if config.vision_layers:
        return "words"
    return "images" if 0 < config.language_layers < -above else "alone"


def experts_of(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """The feed-forward networks of a joint layer: the top `vl_expert_layers` have a vision-language expert."""
    has_vl = layer >= config.layers - config.vl_expert_layers
    return ("vision", "vl", "language") if has_vl else modules_of(config.ffn)


def block_of(config: ModelConfig, layer: int) -> nn.Module:
    """The modules of a layer."""
    match kind_of(config, layer):
        case "co_attention":
            return CoAttention(config)
        case "connected":
            return Connected(config)
        case "images":
            return Block(config, ("vision",), ("vision",))
        case "words":
            return Block(config, WORDS, WORDS)
    return Block(config, modules_of(config.attention), experts_of(config, layer))


class Encoder(nn.ModuleDict):
    """The stack of blocks under their numbers.

    A dictionary and not a list, so that a pipeline stage can leave out blocks and the others keep their names. `enter`
    and `leave` are where sequence parallelism shares out the tokens; without it they change nothing.
    """

    enter: Callable[[Tensor, Any, Any], tuple[Tensor, Any, Any]] = staticmethod(lambda *inputs: inputs)
    """(x [T, D], layout, selection) -> what the blocks take."""
    leave: Callable[[Tensor, Any], Tensor] = staticmethod(lambda x_TD, layout: x_TD)
    """(the last block's output, the layout that `enter` gave) -> the output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__({str(layer): block_of(config, layer) for layer in range(config.layers)})
        self.kinds = {str(layer): kind_of(config, layer) for layer in range(config.layers)}
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
            # Nothing in a block draws from a generator, so there is no state to restore on recompute.
            run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            x_TD = _through(
                run if recompute == "full" else block, self.kinds[layer], x_TD, layout, keep_2T, wanted, recompute
            )
        return self.leave(x_TD, layout)


def _through(
    block: Callable[..., Tensor],
    kind: Kind,
    x_TD: Tensor,
    layout: TokenLayout,
    keep_2T: Tensor | None,
    selection: Selection | None,
    recompute: Recompute,
) -> Tensor:
    """The tokens behind a block, with those that rest in it as they were."""
    if kind == "joint":
        return block(x_TD, layout, keep_2T, selection, recompute)
    if kind == "alone":
        return block(x_TD, layout.alone, keep_2T, selection, recompute)
    image_patches, pair_patches, pair_words, text_words = layout.segments
    first, own, rest, of_own = image_patches, pair_patches + pair_words, text_words, layout.pairs
    if kind == "images":
        first, own, rest, of_own = 0, image_patches + pair_patches, pair_words + text_words, layout.images_alone
    elif kind == "words":
        first, own, rest, of_own = image_patches + pair_patches, pair_words + text_words, 0, layout.words_alone
    before_TD, own_TD, after_TD = x_TD.split([first, own, rest])
    keep = None if keep_2T is None else keep_2T[:, first : first + own]
    own_TD = block(own_TD, of_own, keep, None, recompute)
    x_TD = torch.cat([before_TD, own_TD, after_TD])
    return x_TD if selection is None else x_TD.index_select(0, selection.rows)
