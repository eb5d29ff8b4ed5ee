"""LayerNorm(GELU(x)) that keeps x alone for the backward pass.

GELU costs far less to compute again than its result costs to keep: four times the model's width for each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu


class _GeluLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, scale = torch.native_layer_norm(gelu(x), weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        of_gelu, of_weight, of_bias = backward(
            gradient.contiguous(), gelu(x), weight.shape, mean, scale, weight, bias, [True, True, True]
        )
        return torch.ops.aten.gelu_backward(of_gelu, x), of_weight, of_bias, None


def gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`plain_gelu_layer_norm`, which forgets GELU's result."""
    return _GeluLayerNorm.apply(x, weight, bias, eps)
