"""LayerNorm(GELU(x)) that keeps x alone for the backward pass, which computes GELU again while it reads x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_dist.kernels.layer_norm.triton import Normalize, normalize_backward, normalize_forward
from beit3_dist.kernels.triton.launch import require_narrow


def gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(GELU(x)). x: [..., F]; weight, bias: [F]. GELU's result is not even rounded to x's type."""
    return Normalize.apply(x, weight, bias, eps, True)


class _LinearGeluNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
    ) -> Tensor:
        require_narrow("x", x)
        hidden = torch.addmm(bias, x, weight.t())
        y, mean, scale = normalize_forward(hidden, norm_weight, norm_bias, eps, of_gelu=True)
        ctx.save_for_backward(x, weight, hidden, norm_weight, mean, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden, norm_weight, mean, scale = ctx.saved_tensors
        of_hidden, (of_norm_weight, of_norm_bias, of_bias) = normalize_backward(
            gradient, hidden, norm_weight, mean, scale, of_gelu=True, sum_of_x=True
        )
        return of_hidden @ weight, of_hidden.t() @ x, of_bias, of_norm_weight, of_norm_bias, None


def linear_gelu_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(GELU(x W' + b)). x: [T, D]; weight: [F, D]; bias and the norm's: [F]."""
    return _LinearGeluNorm.apply(x, weight, bias, norm_weight, norm_bias, eps)
