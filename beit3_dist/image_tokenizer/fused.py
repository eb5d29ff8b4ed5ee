"""The image tokenizer's encoder by fused kernels, for targets alone: without gradients.

As under autocast, products are computed in bf16 and the tokens kept in fp32, in which norms are computed. A residual
connection and the norm behind it are one kernel, which takes the branch in bf16 and gives the next product's input in
bf16; its biases, in fp32, are added there. The products' weights are converted once.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from beit3_dist.image_tokenizer.network import LAYER_NORM_EPS, VQKD
from beit3_dist.kernels.registry import Function, Sizes
from beit3_dist.kernels.residual_norm.definition import Branch, Norms
from beit3_dist.parallel.kernels import chosen_function

HALF = torch.bfloat16


def fuse_encoder(tokenizer: VQKD, kernels: str) -> bool:
    """Has the encoder computed so, in evaluation, where `kernels` (of the config) means fused ones; whether it does."""
    width, heads = tokenizer.geometry["width"], tokenizer.geometry["heads"]
    sizes = Sizes(width=width, ffn_width=4 * width, heads=heads)
    residual_norm = chosen_function("residual_norm", kernels, torch.float32, sizes)
    if residual_norm is not None:
        tokenizer.encoder.forward = FusedEncoder(tokenizer.encoder, residual_norm)  # type: ignore[method-assign]
    return residual_norm is not None


class FusedEncoder:
    """`VisionTransformer.forward` of `encoder`, whose weights do not change any more."""

    def __init__(self, encoder: Any, residual_norm: Function) -> None:
        self._encoder, self._residual_norm = encoder, residual_norm
        self._half = deepcopy(encoder).to(HALF)
        self._biases = [block.attn.bias().to(HALF) for block in encoder.blocks]

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        encoder, half = self._encoder, self._half
        patches_BND = half.patch_embed(pixels.to(HALF)).flatten(2).transpose(1, 2)
        batch, patches, width = patches_BND.shape
        positions = encoder.positions(patches)
        x_BND = positions.new_empty(batch, 1 + patches, width)
        x_BND[:, :1] = encoder.cls_token + positions[:, :1]
        torch.add(patches_BND, positions[:, 1:], out=x_BND[:, 1:])

        x_TD = x_BND.flatten(0, 1)
        norms = [norm for block in encoder.blocks for norm in (block.norm1, block.norm2)]
        following = iter([(norm, HALF) for norm in norms] + [(encoder.fc_norm, torch.float32)])

        def add_and_normalize(x_TD: Tensor, branch: Branch | None) -> tuple[Tensor, Tensor]:
            norm, dtype = next(following)
            of_all = Norms([len(x_TD)], [norm.weight], [norm.bias], LAYER_NORM_EPS, dtype=dtype)
            x_TD, (y_TD,) = self._residual_norm(x_TD, branch, None, of_all)
            return x_TD, y_TD

        x_TD, y_TD = add_and_normalize(x_TD, None)
        for block, in_half, bias in zip(encoder.blocks, half.blocks, self._biases, strict=True):
            mixed_BND = in_half.attn.mix(y_TD.view(batch, 1 + patches, width), bias)
            of_attention = linear(mixed_BND.flatten(0, 1), in_half.attn.proj.weight)
            x_TD, y_TD = add_and_normalize(x_TD, Branch([of_attention], [block.attn.proj.bias]))
            of_experts = linear(in_half.mlp[:2](y_TD), in_half.mlp.fc2.weight)
            x_TD, y_TD = add_and_normalize(x_TD, Branch([of_experts], [block.mlp.fc2.bias]))
        return y_TD.view(batch, 1 + patches, width)[:, 1:]
