"""Blocks whose arithmetic between matrix products and attention's core runs in few kernels.

    residual, norm               what the block before has left to add, and normal tokens, which lie sample by sample
                                 where the projections are shared
    q, k and v                   one product; attention over samples of different lengths, without padding
    out, residual, norm          the bias, drop path, the residual connection and the experts' norms in one kernel
    experts                      fc1, GELU (and sub-LayerNorm), fc2; gradients of biases come with other passes

Two biases of shared projections cost a pass over all tokens' gradients, which is left out. That of the keys adds the
same to all of a query's scores, so that the softmax does not see it: its gradient is exactly zero. That of the values
adds itself to what attention mixes, whose shares are 1 together: it goes through the output projection as a vector.

Only what crosses no ranks: with tensor parallelism the modules' own kernels are used (see parallel/kernels.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from beit3_dist.config import Recompute
from beit3_dist.kernels.linear import Linear, Product
from beit3_dist.kernels.registry import Function
from beit3_dist.kernels.residual_norm.definition import Branch, Norms
from beit3_dist.kernels.varlen_attention.definition import VarlenAttention
from beit3_dist.model.attention import attend
from beit3_dist.model.block import Block
from beit3_dist.model.multiway import FeedForward, Multiway, join
from beit3_dist.model.token_layout import Packing, Segments, Selection, TokenLayout


@dataclass(frozen=True)
class Unadded:
    """What a block leaves for the first kernel of the next one to add: x + keep (branch + bias)."""

    x_TD: Tensor
    branch: Branch | None
    keep_T: Tensor | None


def add(x: Tensor | Unadded, residual_norm: Function) -> Tensor:
    """The tokens [T, D], also of what is not added yet."""
    return residual_norm(x.x_TD, x.branch, x.keep_T, None)[0] if isinstance(x, Unadded) else x


class FusedForward:
    """`Block.forward` of one block. `kernels`: who computes each operation. `core`: attention over samples of
    different lengths, or None for torch's over padded ones. `product`: what multiplies in the projections, or None for
    torch."""

    def __init__(
        self,
        block: Block,
        kernels: Mapping[str, Function],
        core: VarlenAttention | None,
        product: Product | None = None,
    ) -> None:
        self._block, self._kernels, self._core, self._product = block, kernels, core, product
        self._sharded = any(hasattr(parameter, "ds_id") for parameter in block.parameters())
        """By ZeRO-3, which is told of the tensors that go in and out of a block."""

    def __call__(
        self,
        x: Tensor | Unadded,
        layout: TokenLayout,
        keep_2T: Tensor | None,
        selection: Selection | None = None,
        recompute: Recompute = "none",
    ) -> Tensor | Unadded:
        """`recompute`, where it is full: the result is what a caller keeps, and is added up."""
        block, attention, residual_norm = self._block, self._block.attention, self._kernels["residual_norm"]
        if attention.attend is not attend:  # someone keeps keys and values: decoding.py
            return Block.forward(block, add(x, residual_norm), layout, keep_2T, selection, recompute)
        before = x if isinstance(x, Unadded) else Unadded(x, None, None)
        packing = layout.packing(before.x_TD.device) if self._core is not None else None
        # One expert's tokens may be projected in any order, so its norm already writes them sample by sample.
        place = packing.place if packing is not None and len(attention.q.experts) == 1 else None

        norms = _norms(block.attention_norm, layout, place)
        x_TD, slices = residual_norm(before.x_TD, before.branch, before.keep_T, norms)
        qkv = self._project(slices, layout, packing if place is None else None)
        if recompute in ("attention", "selective"):
            mixed_TD = checkpoint(self._mix, qkv, layout, packing, use_reentrant=False, preserve_rng_state=False)
        else:
            mixed_TD = self._mix(qkv, layout, packing)

        tokens: Segments = layout
        if selection is not None:
            rows = selection.rows
            mixed_TD = _Select.apply(mixed_TD, rows if packing is None else packing.place.index_select(0, rows))
            x_TD, tokens, packing, place = _Select.apply(x_TD, rows), selection, None, None
            keep_2T = None if keep_2T is None else keep_2T.index_select(1, rows)
        mixed = self._inner_norm(mixed_TD, tokens, packing if place is None else None)
        outs = _modules(attention.out)
        if self._carries_bias:
            (out,), (values,) = outs, _modules(attention.v)
            projected, bias = _Output.apply(mixed[0], out.weight, out.bias, values.bias)
            branch = Branch([projected], [bias], place)
        else:
            of_experts = [_product(out, part) for out, part in zip(outs, mixed, strict=True)]
            branch = Branch(of_experts, [out.bias for out in outs], place)
        keep = (None, None) if keep_2T is None else keep_2T.unbind(0)
        experts = _modules(block.ffn)
        x_TD, slices = residual_norm(x_TD, branch, keep[0], _norms(block.ffn, tokens))

        # Without a norm behind GELU drop path comes with it, so that the branch's gradient is that of the tokens.
        kept = keep[1] is not None and experts[0].inner_norm is None
        kept_T = keep[1] if kept else None
        if recompute == "selective":
            hidden = checkpoint(self._experts, experts, slices, kept_T, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = self._experts(experts, slices, kept_T)
        after = Unadded(x_TD, Branch(hidden, [e.fc2.bias for e in experts], kept=kept), keep[1])
        return add(after, residual_norm) if recompute == "full" or self._sharded else after

    @property
    def _carries_bias(self) -> bool:
        """Whether the values' bias goes through the output projection instead of the attention."""
        attention = self._block.attention
        if self._product is not None:
            return False
        return len(attention.q.experts) == 1 and attention.inner_norm is None and not self._sharded

    def _project(self, slices: list[Tensor], layout: TokenLayout, packing: Packing | None) -> Tensor:
        """q, k and v, [T, 3, H, d]; with `packing` they come sample by sample, else as the slices do."""
        attention = self._block.attention
        parameters = [
            getattr(projection[expert], kind)
            for kind in ("weight", "bias")
            for expert in attention.q.experts
            for projection in (attention.q, attention.k, attention.v)
        ]
        if self._product is not None:
            qkv = _projected(self._product, slices, parameters, packing)
            return qkv.view(len(qkv), 3, -1, attention.head_dim)
        pairs = None
        if packing is not None:
            first, pair_patches, pair_words, _ = layout.segments
            pairs = slice(first, first + pair_patches + pair_words), packing
        column_sums, of_queries = self._kernels["column_sums"], self._carries_bias
        qkv = _Projection.apply(column_sums, pairs, of_queries, len(slices), *slices, *parameters)
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

    def _experts(self, experts: list[FeedForward], slices: list[Tensor], keep_T: Tensor | None) -> list[Tensor]:
        """Each expert's output without the bias of fc2. keep_T: factors of the tokens; None: ones."""
        kernels, outputs = self._kernels, []
        sizes = [len(part) for part in slices]
        keeps = [None] * len(slices) if keep_T is None else keep_T.split(sizes)
        for expert, x_TD, keep in zip(experts, slices, keeps, strict=True):
            fc1, norm = expert.fc1, expert.inner_norm
            if norm is None:
                hidden_TF = kernels["linear_gelu"](x_TD, fc1.weight, fc1.bias, keep)
            else:
                affine = (norm.weight, norm.bias, norm.eps)
                hidden_TF = kernels["linear_gelu_layer_norm"](x_TD, fc1.weight, fc1.bias, *affine)
            outputs.append(_product(expert.fc2, hidden_TF))
        return outputs


def _modules(multiway: Multiway) -> list[Any]:
    """The experts' modules in the order of their slices."""
    return [multiway[name] for name in multiway.experts]


def _norms(multiway: Multiway, layout: Segments, place_T: Tensor | None = None) -> Norms:
    """The LayerNorms that experts are, or begin with."""
    norms: list[nn.LayerNorm] = [m.norm if isinstance(m, FeedForward) else m for m in _modules(multiway)]
    sizes = layout.sizes(multiway.experts)
    return Norms(sizes, [norm.weight for norm in norms], [norm.bias for norm in norms], norms[0].eps, place_T)


def _product(linear: Linear, x: Tensor) -> Tensor:
    """x W' without the bias, by the layer's own product: under ZeRO-3 it keeps no gathered weights."""
    return linear.compute(x, linear.weight, None)


def _projected(product: Product, slices: list[Tensor], parameters: list[Tensor], packing: Packing | None) -> Tensor:
    """What `_Projection` computes, by another product."""
    experts = len(slices)
    weights, biases = parameters[: 3 * experts], parameters[3 * experts :]
    three = [slice(3 * e, 3 * e + 3) for e in range(experts)]
    qkv = join([product(x, torch.cat(weights[of]), torch.cat(biases[of])) for x, of in zip(slices, three, strict=True)])
    return qkv if packing is None else _Permute.apply(qkv, packing.order, packing.place)


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


class _Select(torch.autograd.Function):
    """x[rows] for different rows; backward puts them into zeros, where torch would add them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.rows, gradient), None


class _Projection(torch.autograd.Function):
    """q, k and v of all tokens in one matrix [T, 3 D], a product for each expert. `of_queries`: the keys' and values'
    biases are not added; the keys' gradient is zero."""

    @staticmethod
    def forward(
        ctx: Any,
        column_sums: Function,
        pairs: tuple[slice, Packing] | None,
        of_queries: bool,
        experts: int,
        *tensors: Tensor,
    ) -> Tensor:
        slices, parameters = tensors[:experts], tensors[experts:]
        weights, biases = parameters[: 3 * experts], parameters[3 * experts :]
        sizes, width = [len(part) for part in slices], weights[0].shape[0]
        qkv = slices[0].new_empty(sum(sizes), 3 * width)
        for e, (part, out) in enumerate(zip(slices, qkv.split(sizes), strict=True)):
            of_expert = biases[3 * e : 3 * e + 3]
            bias = pad(of_expert[0], (0, 2 * width)) if of_queries else torch.cat(of_expert)
            torch.addmm(bias, part, _joined(weights[3 * e : 3 * e + 3]).t(), out=out)
        if pairs is not None:
            _reorder(qkv, pairs[0], pairs[1].order)
        ctx.save_for_backward(*slices, *weights)
        ctx.column_sums, ctx.pairs, ctx.of_queries, ctx.sizes = column_sums, pairs, of_queries, sizes
        return qkv

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        experts, width = len(ctx.sizes), gradient.shape[1] // 3
        saved = ctx.saved_tensors  # once: a recomputed block gives them only once
        slices, weights = saved[:experts], saved[experts:]
        if ctx.pairs is not None:  # in place: the gradient was made by attention's core, for nobody else
            _reorder(gradient, ctx.pairs[0], ctx.pairs[1].place)
        needed = ctx.needs_input_grad[4:]
        of_slices: list[Tensor | None] = []
        of_weights: list[Tensor | None] = []
        of_biases: list[Tensor | None] = []
        for e, (part, of_qkv) in enumerate(zip(slices, gradient.split(ctx.sizes), strict=True)):
            of_slices.append(of_qkv @ _joined(weights[3 * e : 3 * e + 3]) if needed[e] else None)
            trained = any(needed[experts + 3 * e : experts + 3 * e + 3])
            of_weights += (of_qkv.t() @ part).chunk(3) if trained else [None] * 3
            if ctx.of_queries:
                of_biases += [ctx.column_sums(of_qkv[:, :width]), gradient.new_zeros(width), None]
            else:
                of_biases += ctx.column_sums(of_qkv).chunk(3)
        return None, None, None, None, *of_slices, *of_weights, *of_biases


class _Output(torch.autograd.Function):
    """The output projection x W' of all tokens, and what is to be added to it: its own bias and what it makes of the
    values', b + W c. W's gradient is that of both, added up in the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, of_values: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, of_values)
        return x @ weight.t(), torch.addmv(bias, weight, of_values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, of_sum: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, of_values = ctx.saved_tensors
        for_x, for_weight, *_ = ctx.needs_input_grad
        of_weight = torch.outer(of_sum, of_values).addmm_(gradient.t(), x) if for_weight else None
        return gradient @ weight if for_x else None, of_weight, of_sum, weight.t() @ of_sum


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Matrices one below the other: a view where they lie so already, as in ZeRO's flat buffers; else a copy, which
    costs little beside a product."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.storage_offset() == end and part.is_contiguous()):
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), first.shape[1]), first.stride())


def _reorder(x: Tensor, rows: slice, places: Tensor) -> None:
    """x[rows] = x[places[rows]], in place."""
    x[rows] = x.index_select(0, places[rows])
