"""Attention within samples of different lengths that lie one behind the other, without padding and without copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

VarlenAttention = Callable[[Tensor, Tensor, int], Tensor]
"""(q, k and v [T, 3, H, d], the first token of each sample and the end int32 [S + 1], length of the longest sample or
more) -> softmax(q k' / sqrt(d)) v within each sample, [T, H, d]."""


def plain_varlen_attention(qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
    """Sample by sample."""
    mixed, ends = [], cumulative.tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        q, k, v = qkv[start:end].transpose(0, 2).unbind(1)  # [H, N, d]
        mixed.append(scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(mixed) if mixed else qkv.new_empty(0, *qkv.shape[2:])
