"""LayerNorm(GELU(x)) that keeps x alone for the backward pass, which computes GELU again while it reads x."""

from __future__ import annotations

from torch import Tensor

from beit3_dist.kernels.triton.layer_norm import Normalize


def gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(GELU(x)). x: [..., F]; weight, bias: [F]. GELU's result is not even rounded to x's type."""
    return Normalize.apply(x, weight, bias, eps, True)
