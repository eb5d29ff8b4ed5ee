"""LayerNorm(GELU(x)): the experts' sub-LayerNorm behind their activation. GELU (Hendrycks and Gimpel 2016) is exact."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear


def plain_gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [..., F]; weight, bias: [F]."""
    return layer_norm(gelu(x), weight.shape, weight, bias, eps)


def plain_linear_gelu_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(GELU(x W' + b)). x: [T, D]; weight: [F, D]; bias and the norm's: [F]."""
    return plain_gelu_layer_norm(linear(x, weight, bias), norm_weight, norm_bias, eps)
