"""LayerNorm by Apex's fused kernel on CUDA where it is installed, else by torch's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from beit3_dist.kernels.layer_norm.definition import plain_layer_norm


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
    return plain_layer_norm(x, weight, bias, eps)
