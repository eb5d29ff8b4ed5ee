"""LayerNorm (Ba et al. 2016) over the last dimension: Apex's fused kernel on CUDA where installed, else torch's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm as plain_layer_norm

Norm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(x [..., D], weight [D], bias [D], eps) -> [..., D]."""


@cache
def apex_layer_norm() -> Callable[..., Any] | None:
    """Apex's (x, weight, bias, shape, eps) -> x, or None where NVIDIA's Apex is not installed with its CUDA kernels.

    Apex is built from source, with or without them; the package of that name on the public index is something else.
    """
    try:
        importlib.import_module("fused_layer_norm_cuda")
        return getattr(importlib.import_module("apex.normalization.fused_layer_norm"), "fused_layer_norm_affine", None)
    except ImportError:
        return None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [..., D]; weight, bias: [D]."""
    fused = None
    # A compiler joins the plain one with what is around it. Apex starts a grid of as many blocks as there are rows, and
    # an expert without tokens has none.
    if not torch.compiler.is_compiling() and x.is_cuda and x.numel():
        fused = apex_layer_norm()
    if fused is not None:
        return fused(x, weight, bias, weight.shape, eps)
    return plain_layer_norm(x, weight.shape, weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm. `compute` may be replaced by another kernel of the same signature."""

    compute: Norm = staticmethod(layer_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias, self.eps)
