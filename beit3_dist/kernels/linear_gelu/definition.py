"""A linear layer and the GELU behind it, in its exact form (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, linear


def plain_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: [T, D]; weight: [F, D]; bias: [F] -> [T, F]."""
    return gelu(linear(x, weight, bias))
