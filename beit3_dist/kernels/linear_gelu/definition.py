"""A linear layer and the GELU behind it, in its exact form (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import gelu, linear


def plain_linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep_T: Tensor | None = None, product: Callable[..., Tensor] = linear
) -> Tensor:
    """keep gelu(x W' + b), [T, F]. x: [T, D]; weight: [F, D]; bias: [F]; keep_T: a factor of each row; None: ones.
    product: what computes x W' + b."""
    hidden = gelu(product(x, weight, bias))
    return hidden if keep_T is None else hidden * keep_T[:, None]
