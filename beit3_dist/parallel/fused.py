"""Blocks whose arithmetic between matrix products and attention's core runs in few kernels.

    norm                         normal tokens, which lie sample by sample where the projections are shared
    q, k and v                   one product; attention over samples of different lengths, without padding
    out, residual, norm          the bias, drop path, the residual connection and the experts' norms in one kernel
    experts                      fc1, GELU (and sub-LayerNorm), fc2; gradients of biases come with other passes
    residual                     as above

Only what crosses no ranks: with tensor parallelism the modules' own kernels are used (see parallel/kernels.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import Recompute
from beit3_dist.kernels.linear import Linear
from beit3_dist.kernels.registry import Function
from beit3_dist.kernels.residual_norm.definition import Branch, Norms
from beit3_dist.kernels.varlen_attention.definition import VarlenAttention
from beit3_dist.model.attention import attend
from beit3_dist.model.block import Block
from beit3_dist.model.multiway import FeedForward, Multiway
from beit3_dist.model.token_layout import Packing, Segments, Selection, TokenLayout


class FusedForward:
    """`Block.forward` of one block. `kernels`: who computes each operation. `core`: attention over samples of
    different lengths, or None for torch's over padded ones."""

    def __init__(self, block: Block, kernels: Mapping[str, Function], core: VarlenAttention | None) -> None:
        self._block, self._kernels, self._core = block, kernels, core

    def __call__(
        self,
        x_TD: Tensor,
        layout: TokenLayout,
        keep_2T: Tensor | None,
        selection: Selection | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        block, attention, residual_norm = self._block, self._block.attention, self._kernels["residual_norm"]
        if attention.attend is not attend:  # someone keeps keys and values: decoding.py
            return Block.forward(block, x_TD, layout, keep_2T, selection, recompute)
        packing = layout.packing(x_TD.device) if self._core is not None else None
        # One expert's tokens may be projected in any order, so its norm already writes them sample by sample.
        place = packing.place if packing is not None and len(attention.q.experts) == 1 else None

        x_TD, slices = residual_norm(x_TD, None, None, _norms(block.attention_norm, layout), place)
        qkv = self._project(slices, layout, packing if place is None else None)
        if recompute in ("attention", "selective"):
            mixed_TD = checkpoint(self._mix, qkv, layout, packing, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed_TD = self._mix(qkv, layout, packing)

        tokens: Segments = layout
        if selection is not None:
            rows = selection.rows
            mixed_TD = mixed_TD.index_select(0, rows if packing is None else packing.place.index_select(0, rows))
            x_TD, tokens, packing, place = x_TD.index_select(0, rows), selection, None, None
            keep_2T = None if keep_2T is None else keep_2T.index_select(1, rows)
        mixed = self._inner_norm(mixed_TD, tokens, packing if place is None else None)
        branch = Branch(
            [_product(out, part) for out, part in zip(_modules(attention.out), mixed, strict=True)],
            [projection.bias for projection in _modules(attention.out)],
        )
        keep = (None, None) if keep_2T is None else keep_2T.unbind(0)
        experts = _modules(block.ffn)
        x_TD, slices = residual_norm(x_TD, branch, keep[0], _norms(block.ffn, tokens), place)

        if recompute == "selective":
            hidden = checkpoint(self._experts, experts, slices, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = self._experts(experts, slices)
        return residual_norm(x_TD, Branch(hidden, [e.fc2.bias for e in experts]), keep[1], None)[0]

    def _project(self, slices: list[Tensor], layout: TokenLayout, packing: Packing | None) -> Tensor:
        """q, k and v, [T, 3, H, d]; with `packing` they come sample by sample, else as the slices do."""
        attention = self._block.attention
        parameters = [
            getattr(projection[expert], kind)
            for kind in ("weight", "bias")
            for expert in attention.q.experts
            for projection in (attention.q, attention.k, attention.v)
        ]
        pairs = None
        if packing is not None:
            first, pair_patches, pair_words, _ = layout.segments
            pairs = slice(first, first + pair_patches + pair_words), packing
        qkv = _Projection.apply(self._kernels["column_sums"], pairs, len(slices), *slices, *parameters)
        return qkv.view(len(qkv), 3, -1, attention.head_dim)

    def _inner_norm(self, mixed_TD: Tensor, layout: Segments, packing: Packing | None) -> list[Tensor]:
        """What the output projections take, for each expert in the layout's order; with `packing` it comes sample by
        sample."""
        attention = self._block.attention
        if attention.inner_norm is None:
            if packing is not None:
                mixed_TD = _Permute.apply(mixed_TD, packing.place, packing.order)
            return attention.out.slices(mixed_TD, layout)
        norms = _norms(attention.inner_norm, layout)
        if packing is not None:
            return self._kernels["gathered_norm"](mixed_TD, packing.place, norms)
        return self._kernels["residual_norm"](mixed_TD, None, None, norms)[1]

    def _mix(self, qkv: Tensor, layout: TokenLayout, packing: Packing | None) -> Tensor:
        """Attention's core, [T, H * d] in the order of qkv."""
        if packing is not None and self._core is not None:
            return self._core(qkv, packing.cumulative, packing.longest).flatten(1)
        q, k, v = qkv.unbind(1)
        return attend([q], [k], [v], layout)[0].flatten(1)

    def _experts(self, experts: list[FeedForward], slices: list[Tensor]) -> list[Tensor]:
        """Each expert's output without the bias of fc2."""
        kernels, outputs = self._kernels, []
        for expert, x_TD in zip(experts, slices, strict=True):
            fc1, norm = expert.fc1, expert.inner_norm
            if norm is None:
                hidden_TF = kernels["linear_gelu"](x_TD, fc1.weight, fc1.bias)
            else:
                affine = (norm.weight, norm.bias, norm.eps)
                hidden_TF = kernels["linear_gelu_layer_norm"](x_TD, fc1.weight, fc1.bias, *affine)
            outputs.append(_product(expert.fc2, hidden_TF))
        return outputs


def _modules(multiway: Multiway) -> list[Any]:
    """The experts' modules in the order of their slices."""
    return [multiway[name] for name in multiway.experts]


def _norms(multiway: Multiway, layout: Segments) -> Norms:
    """The LayerNorms that experts are, or begin with."""
    norms: list[nn.LayerNorm] = [m.norm if isinstance(m, FeedForward) else m for m in _modules(multiway)]
    sizes = layout.sizes(multiway.experts)
    return Norms(sizes, [norm.weight for norm in norms], [norm.bias for norm in norms], norms[0].eps)


def _product(linear: Linear, x: Tensor) -> Tensor:
    """x W' without the bias, by the layer's own product: under ZeRO-3 it keeps no gathered weights."""
    return linear.compute(x, linear.weight, None)


class _Permute(torch.autograd.Function):
    """x[rows] for a permutation; backward takes the reverse, where torch would add up rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, reverse: Tensor) -> Tensor:
        ctx.reverse = reverse
        return x.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.reverse), None, None


class _Projection(torch.autograd.Function):
    """q, k and v of all tokens in one matrix [T, 3 D], a product for each expert: its three matrices are joined first,
    which costs little beside the product."""

    @staticmethod
    def forward(
        ctx: Any, column_sums: Function, pairs: tuple[slice, Packing] | None, experts: int, *tensors: Tensor
    ) -> Tensor:
        slices, parameters = tensors[:experts], tensors[experts:]
        weights, biases = parameters[: 3 * experts], parameters[3 * experts :]
        sizes = [len(part) for part in slices]
        qkv = slices[0].new_empty(sum(sizes), 3 * weights[0].shape[0])
        for e, (part, out) in enumerate(zip(slices, qkv.split(sizes), strict=True)):
            weight, bias = torch.cat(weights[3 * e : 3 * e + 3]), torch.cat(biases[3 * e : 3 * e + 3])
            torch.addmm(bias, part, weight.t(), out=out)
        if pairs is not None:
            _reorder(qkv, pairs[0], pairs[1].order)
        ctx.save_for_backward(*slices, *weights)
        ctx.column_sums, ctx.pairs, ctx.sizes = column_sums, pairs, sizes
        return qkv

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        experts = len(ctx.sizes)
        slices, weights = ctx.saved_tensors[:experts], ctx.saved_tensors[experts:]
        if ctx.pairs is not None:  # in place: the gradient was made by attention's core, for nobody else
            _reorder(gradient, ctx.pairs[0], ctx.pairs[1].place)
        of_slices: list[Tensor] = []
        of_weights: list[Tensor] = []
        of_biases: list[Tensor] = []
        for e, (part, of_qkv) in enumerate(zip(slices, gradient.split(ctx.sizes), strict=True)):
            of_slices.append(of_qkv @ torch.cat(weights[3 * e : 3 * e + 3]))
            of_weights += (of_qkv.t() @ part).chunk(3)
            of_biases += ctx.column_sums(of_qkv).chunk(3)
        return None, None, None, *of_slices, *of_weights, *of_biases


def _reorder(x: Tensor, rows: slice, places: Tensor) -> None:
    """x[rows] = x[places[rows]], in place."""
    x[rows] = x.index_select(0, places[rows])
