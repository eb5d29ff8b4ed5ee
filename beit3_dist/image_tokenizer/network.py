"""The BEiT v2 image tokenizer (Peng et al. 2022): vector-quantised knowledge distillation, VQ-KD.

A vision transformer turns an image into one short unit vector per patch; the nearest entry of a codebook
(quantizer.py) is the patch's code, the target of masked image modelling. In training a shallow decoder rebuilds a
teacher's features from the codes. Names and shapes are those of the released files, so both load the same way:

    encoder.*  encode_task_layer.*  quantize.*  decoder.*  decode_task_layer.*

Shapes: B images, S image side, N patches, D width, C code dimension, T teacher channels.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_dist.image_tokenizer.quantizer import Quantizer
from beit3_dist.model.initialization import SMALL, named_generator

LAYER_NORM_EPS = 1e-6


class TokenizerAttention(nn.Module):
    """Multi-head self-attention whose keys have no bias: it would cancel in the softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def bias(self) -> Tensor:
        """That of q, k and v, [3 D]."""
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))

    def mix(self, x: Tensor, bias: Tensor) -> Tensor:
        """What the output projection takes, [B, 1 + N, D]."""
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.mix(x, self.bias()))


class TokenizerBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = TokenizerAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        layers = {"fc1": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """[B, channels, S, S] -> [B, N, D]: normalised patch tokens, CLS left out."""

    def __init__(self, *, grid: int, patch_size: int, channels: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        projection = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.blocks = nn.ModuleList(TokenizerBlock(width, heads) for _ in range(layers))
        self.fc_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def positions(self, patches: int) -> Tensor:
        """[1, 1 + patches, D]: the table itself, or resized (bicubic) for images of another size than trained on."""
        if patches == self.grid**2:
            return self.pos_embed
        side = math.isqrt(patches)
        table = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat((self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        patches = x.shape[1]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.positions(patches)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x[:, 1:])


@dataclass(frozen=True)
class Quantized:
    """What a training step needs besides the loss."""

    z: Tensor
    """[B, N, C] unit vectors, detached: the input of Quantizer.update."""
    codes: Tensor
    """[B, N] their codes."""
    reconstruction: Tensor
    """Scalar: mean of 1 - cosine(decoder's output, teacher's features), detached."""
    commitment: Tensor
    """Scalar: mean squared distance of z from its code, detached."""


class VQKD(nn.Module):
    """The image tokenizer. The defaults are the released base model with the three-layer decoder.

    It works in fp32, or under autocast; the quantisation itself is always fp32.
    """

    def __init__(
        self,
        image_size: int = 224,
        *,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        codebook_size: int = 8192,
        code_dim: int = 32,
        decoder_layers: int = 3,
        target_dim: int = 512,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not divisible by patch_size={patch_size}")
        if width % heads:
            raise ValueError(f"width={width} is not divisible by heads={heads}")
        encoder = {"image_size": image_size, "patch_size": patch_size, "width": width, "layers": layers, "heads": heads}
        codes = {"codebook_size": codebook_size, "code_dim": code_dim}
        self.geometry = encoder | codes | {"decoder_layers": decoder_layers, "target_dim": target_dim}
        self.image_size, self.patch_size, self.grid = image_size, patch_size, image_size // patch_size
        self.encoder = VisionTransformer(
            grid=self.grid, patch_size=patch_size, channels=3, width=width, layers=layers, heads=heads
        )
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.quantize = Quantizer(codebook_size, code_dim)
        self.decoder = VisionTransformer(
            grid=self.grid, patch_size=1, channels=code_dim, width=width, layers=decoder_layers, heads=heads
        )
        self.decode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, target_dim))
        if self.quantize.cluster_size.device.type != "meta":
            self.initialize(seed=0)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Sets every parameter and the codebook (random unit vectors) as a function of (seed, name).

        Matrices and tables: a normal of deviation 0.02; the output matrices of block l = 1..L are divided by
        sqrt(2 l), as in BEiT.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                value = torch.empty(parameter.shape).normal_(std=SMALL, generator=named_generator(seed, name))
                if output := re.search(r"blocks\.(\d+)\.(?:attn\.proj|mlp\.fc2)\.", name):
                    value /= math.sqrt(2 * (int(output[1]) + 1))
                parameter.copy_(value)
        codebook = self.quantize.embedding.weight
        vectors = torch.randn(codebook.shape, generator=named_generator(seed, "quantize.embedding.weight"))
        codebook.copy_(F.normalize(vectors, dim=-1))

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] [B, 3, S, S] -> unit vectors [B, N, C], fp32, before quantisation."""
        side = pixels.shape[-1]
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side) or side % self.patch_size:
            raise ValueError(
                f"pixels must be [B, 3, S, S] with S a multiple of {self.patch_size}, not {list(pixels.shape)}"
            )
        if not pixels.is_floating_point():
            raise ValueError(f"pixels must be floats in [0, 1], not {pixels.dtype}")
        features = self.encoder(2 * pixels - 1)
        with torch.autocast(pixels.device.type, enabled=False):
            return F.normalize(self.encode_task_layer(features.float()), dim=-1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], float [B, 3, S, S] -> codes int64 [B, N], row by row. A pure function.

        S may differ from `image_size`: the position table is then resized, and N = (S / patch_size)^2.
        """
        z = self.embed(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            return self.quantize.codes(z)

    def forward(self, pixels: Tensor, teacher_features: Tensor) -> tuple[Tensor, Quantized]:
        """The training loss for pixels [B, 3, S, S] in [0, 1] and their teacher features [B, N, T]; changes no state.

        loss = mean(1 - cosine(decoded, teacher)) + mean((z - its code)^2), the code held fixed (beta = 1); gradients
        pass the quantisation straight through. `quantize.clusters` and `quantize.update` move the codebook.
        """
        z = self.embed(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            codes = self.quantize.codes(z.detach())
            z_q = self.quantize.look_up(codes)
            commitment = F.mse_loss(z, z_q)
            through = z + (z_q - z).detach()
        decoded = self.decode_task_layer(self.decoder(through.transpose(1, 2).unflatten(2, (self.grid, self.grid))))
        reconstruction = (1 - F.cosine_similarity(decoded.float(), teacher_features.float(), dim=-1)).mean()
        return (reconstruction + commitment, Quantized(z.detach(), codes, reconstruction.detach(), commitment.detach()))
