"""Blocks whose arithmetic torch.compile fuses: all of a block but its attention's core, in two pieces.

    before attention:   norm, projections to q, k and v
    after attention:    output projection, residual, experts, residual, with drop path and sub-LayerNorms

The core stays as it is: it is one fused kernel of torch between copies, and knows the samples' lengths. The pieces know
nothing but how many tokens each segment has, and these numbers they take as unknown: one code serves all micro-batches,
slices of zero tokens included, and none is compiled anew. It does not depend on which micro-batch came first either, so
that a run that is resumed computes with the same code, bit for bit. For that the compiler is told one typical number
where it wants one to choose a kernel by, and never times kernels to choose one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked

from beit3_dist.config import Recompute
from beit3_dist.model.block import Block
from beit3_dist.model.token_layout import Segments, Selection, TokenLayout
from beit3_dist.parallel.tensor import GatheredTokens, SharedTokens

TYPICAL_TOKENS = 8_192
"""Tokens of each segment that kernels are chosen for."""
OPTIONS: dict[str, Any] = {
    "deterministic": True,  # chooses no kernel by its time
    "assume_32bit_indexing": True,  # else lengths that are unknown make all indexes twice as long; it is checked
}


def _any_length(tensor: Tensor, dimension: int = 0) -> Tensor:
    """The tensor, of whose dimension the compiler knows nothing."""
    mark_unbacked(tensor, dimension, hint_override=TYPICAL_TOKENS)
    return tensor


def _sizes(layout: Segments) -> list[Tensor]:
    """The tokens of the segments as lengths of empty tensors: a plain number would be compiled into the code."""
    return [_any_length(torch.empty(tokens, 0)) for tokens in layout.segments]


class _Tokens(Segments):
    """What the pieces read of a layout or of a selection, made inside the graph of what enters it: lengths and rows.

    The real ones stay outside. Older compilers cannot make them there: they follow no object among a class's defaults.
    """

    def __init__(
        self, sizes: list[Tensor], rows: Tensor | None = None, share: int = 0, whole: _Tokens | None = None
    ) -> None:
        a, b, c, d = (size.shape[0] for size in sizes)
        self.counts, self.rows, self.share, self.whole = (a, b, c, d), rows, share, whole

    @property
    def segments(self) -> tuple[int, int, int, int]:
        return self.counts


class _Inputs(NamedTuple):
    """What both pieces read of a block's inputs."""

    x_TD: Tensor
    """[T, D]; with sequence parallelism the rank's share of the tokens."""
    sizes: list[Tensor]
    """Its segments."""
    whole: list[Tensor]
    """Those of attention: others only with sequence parallelism."""
    rows: Tensor | None
    """`GatheredTokens.rows`, with sequence parallelism."""

    def layouts(self, experts: tuple[str, ...]) -> tuple[_Tokens, _Tokens]:
        """What is read of the layouts outside and inside attention: those of `SharedTokens` and `GatheredTokens` with
        sequence parallelism, else the same twice. The tokens are those of the block's `experts`: torch 2.10 has to know
        that a block of images alone has no words."""
        x_TD, sizes, whole, rows = self
        inside = _Tokens(whole, rows, x_TD.shape[0])
        outside = _Tokens(sizes, whole=inside)
        torch._check(x_TD.shape[0] == sum(outside.sizes(experts)))
        if rows is not None:
            torch._check(rows.shape[0] == sum(inside.sizes(experts)))
        return outside, inside


def _before_attention(block: Block, inputs: _Inputs) -> list[list[Tensor]]:
    attention, norm = block.attention, block.attention_norm
    outside, _ = inputs.layouts(norm.experts)
    slices, _ = attention.enter(norm.each(norm.slices(inputs.x_TD, outside)), outside)
    return attention.project(slices)


def _after_attention(
    block: Block,
    inputs: _Inputs,
    mixed: list[Tensor],
    keep_2T: Tensor | None,
    rows: Tensor | None,
    selected: list[Tensor] | None,
    recompute: Recompute,
) -> Tensor:
    attention = block.attention
    outside, inside = inputs.layouts(block.attention_norm.experts)
    for part, tokens in zip(mixed, inside.sizes(attention.q.experts), strict=True):
        torch._check(part.shape[0] == tokens)
    if keep_2T is not None:
        torch._check(keep_2T.shape[1] == inputs.x_TD.shape[0])
    selection: Any = None
    if rows is not None and selected is not None:
        selection = _Tokens(selected, rows)
        torch._check(rows.shape[0] == sum(selection.counts))
    branch = attention.leave(attention.output(mixed, selection), inside)
    return block.after_attention(inputs.x_TD, branch, outside, keep_2T, selection, recompute)


def _compile(piece: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(piece, fullgraph=True, dynamic=False, options=OPTIONS)


_before, _after = _compile(_before_attention), _compile(_after_attention)

VARIANTS = 64
"""How many codes of one piece a process may compile: one for each kind of block (with or without a vision-language
expert, the last one's selected tokens, recomputation), in training and in evaluation. More than that end the run: it
would mean that something else is compiled into the code. torch's own limit of 8 is for one kind of block."""


class CompiledForward:
    """`Block.forward` of one block."""

    def __init__(self, block: Block) -> None:
        torch._dynamo.config.recompile_limit = VARIANTS
        self._block = block

    def __call__(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        keep_2T: Tensor | None,
        selection: Selection | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        block = self._block
        inside = layout.whole if isinstance(layout, SharedTokens) else layout
        assert inside is not None
        rows = inside.rows if isinstance(inside, GatheredTokens) else None
        inputs = _Inputs(_any_length(x_TD), _sizes(layout), _sizes(inside), None if rows is None else _any_length(rows))
        mixed = block.attention.mix(_before(block, inputs), inside, recompute in ("attention", "selective"))
        return _after(
            block,
            inputs,
            [_any_length(part) for part in mixed],
            None if keep_2T is None else _any_length(keep_2T, 1),
            None if selection is None else _any_length(selection.rows),
            None if selection is None else _sizes(selection),
            "selective" if recompute == "selective" else "none",
        )
