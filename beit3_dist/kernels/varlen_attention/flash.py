"""FlashAttention 4's kernel (Dao-AILab) for samples of different lengths."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor


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


def varlen_attention(qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
    """bf16 or fp16, d a multiple of 8."""
    return _FlashAttention4.apply(qkv, cumulative, longest)
