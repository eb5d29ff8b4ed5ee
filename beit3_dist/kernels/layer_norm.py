"""LayerNorm (Ba et al. 2016) over the last dimension: Apex's fused kernel on CUDA where installed, else torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm as plain_layer_norm

from beit3_dist.kernels.apex import apex_function


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, with the kernel picked by device."""

    def forward(self, x: Tensor) -> Tensor:
        fused = None
        if x.is_cuda and not torch.compiler.is_compiling():  # which joins the plain one with what is around it
            fused = apex_function("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")
        if fused is not None:
            return fused(x, self.weight, self.bias, self.normalized_shape, self.eps)
        return plain_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
