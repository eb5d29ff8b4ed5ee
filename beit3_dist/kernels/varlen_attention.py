"""Attention within samples of different lengths that lie one behind the other, without padding and without copies.

The definition goes sample by sample. On CUDA one kernel takes all samples: FlashAttention 4 (Dao-AILab) where its
package is installed, else the one in torch; both compute a head of 88 numbers as one of 96.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

VarlenAttention = Callable[[Tensor, Tensor, int], Tensor]
"""(q, k and v [T, 3, H, d], the first token of each sample and the end int32 [S + 1], length of the longest sample or
more) -> softmax(q k' / sqrt(d)) v within each sample, [T, H, d]."""


def plain_varlen_attention(qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
    """The definition."""
    mixed, ends = [], cumulative.tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        q, k, v = qkv[start:end].transpose(0, 2).unbind(1)  # [H, N, d]
        mixed.append(scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(mixed) if mixed else qkv.new_empty(0, *qkv.shape[2:])


def torch_varlen_attention(qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
    """torch's kernel (FlashAttention 2 unless another one was activated)."""
    from torch.nn.attention.varlen import varlen_attn  # not in older torch

    q, k, v = qkv.unbind(1)
    mixed = varlen_attn(q, k, v, cumulative, cumulative, longest, longest)
    assert isinstance(mixed, Tensor)  # no log-sums were asked for
    return mixed


class _FlashAttention4(torch.autograd.Function):
    """The package's own autograd function would join the three gradients once more."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
        package = importlib.import_module("flash_attn.cute.interface")
        q, k, v = qkv.unbind(1)
        out, log_sum, *_ = package._flash_attn_fwd(
            q, k, v, cu_seqlens_q=cumulative, cu_seqlens_k=cumulative, max_seqlen_q=longest, max_seqlen_k=longest,
            return_lse=True,
        )  # fmt: skip
        ctx.save_for_backward(qkv, out, log_sum, cumulative)
        ctx.longest, ctx.backward_of = longest, package._flash_attn_bwd
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, log_sum, cumulative = ctx.saved_tensors
        of_qkv = torch.empty_like(qkv)
        (q, k, v), (of_q, of_k, of_v) = qkv.unbind(1), of_qkv.unbind(1)
        ctx.backward_of(
            q, k, v, out, gradient.contiguous(), log_sum, cu_seqlens_q=cumulative, cu_seqlens_k=cumulative,
            max_seqlen_q=ctx.longest, max_seqlen_k=ctx.longest, dq=of_q, dk=of_k, dv=of_v,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return of_qkv, None, None


def flash_varlen_attention(qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
    """FlashAttention 4's kernel: bf16 or fp16, d a multiple of 8."""
    return _FlashAttention4.apply(qkv, cumulative, longest)


@dataclass(frozen=True)
class VarlenKernel:
    """A kernel and what it needs: bf16 or fp16 on CUDA in any case."""

    compute: VarlenAttention
    module: str
    needs: str
    """The package of `module`, for people."""
    hopper: bool
    """Whether older GPUs than the H100 are left out."""


VARLEN_ATTENTION = {
    "flash": VarlenKernel(flash_varlen_attention, "flash_attn.cute", "the package flash-attn-4", hopper=True),
    "varlen": VarlenKernel(torch_varlen_attention, "torch.nn.attention.varlen", "torch 2.10 or newer", hopper=False),
}
"""By name, the fastest first."""
