"""LayerNorm (Ba et al. 2016) over the last dimension: Apex's fused kernel on CUDA where installed, else torch's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm as plain_layer_norm

from beit3_dist.kernels.apex import apex_function

Norm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(x [..., D], weight [D], bias [D], eps) -> [..., D]."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [..., D]; weight, bias: [D]."""
    fused = None
    if x.is_cuda and not torch.compiler.is_compiling():  # which joins the plain one with what is around it
        fused = apex_function("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")
    if fused is not None:
        return fused(x, weight, bias, weight.shape, eps)
    return plain_layer_norm(x, weight.shape, weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm. `compute` may be replaced by another kernel of the same signature."""

    compute: Norm = staticmethod(layer_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias, self.eps)
