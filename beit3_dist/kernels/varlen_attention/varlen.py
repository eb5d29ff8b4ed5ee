"""torch's kernel for samples of different lengths: FlashAttention 2 unless another one was activated."""

from __future__ import annotations

from torch import Tensor


def varlen_attention(qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
    """bf16 or fp16, d a multiple of 8."""
    from torch.nn.attention.varlen import varlen_attn  # not in older torch

    q, k, v = qkv.unbind(1)
    mixed = varlen_attn(q, k, v, cumulative, cumulative, longest, longest)
    assert isinstance(mixed, Tensor)  # no log-sums were asked for
    return mixed
