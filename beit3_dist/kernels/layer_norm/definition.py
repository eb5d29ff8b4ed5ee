"""LayerNorm (Ba et al. 2016) over the last dimension."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import layer_norm


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [..., D]; weight, bias: [D]."""
    return layer_norm(x, weight.shape, weight, bias, eps)
