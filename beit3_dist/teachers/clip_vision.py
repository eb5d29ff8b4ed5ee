"""The vision transformer of CLIP (Radford et al. 2021), under the keys of OpenAI's and open_clip's files.

BEiT v2 distils it: the features of a patch are its token after the last norm, mapped into CLIP's joint space.
Shapes: B images, S image side, N patches, W width, T dimension of the joint space.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI's approximation of the GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class CLIPBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, ffn_width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)  # for its names; `attention` computes
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, ffn_width),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(ffn_width, width),
            )
        )

    def attention(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CLIPVision(nn.Module):
    """Normalised pixels [B, 3, S, S] -> ln_post(patch tokens) @ proj [B, N, T]; CLS takes part but is left out."""

    def __init__(
        self,
        *,
        grid: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        ffn_width: int,
        target_dim: int,
        quick_gelu: bool,
    ) -> None:
        super().__init__()
        self.image_size = grid * patch_size
        self.target_dim = target_dim
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + grid * grid, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = nn.Sequential(*(CLIPBlock(width, heads, ffn_width, quick_gelu) for _ in range(layers)))
        self.transformer = nn.Sequential(OrderedDict(resblocks=blocks))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, target_dim))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(patches), 1, -1), patches), dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 1:]) @ self.proj


def clip_vision_from(state: dict[str, Tensor], *, quick_gelu: bool, head_dim: int) -> CLIPVision:
    """The visual tower among the tensors of a CLIP model, or alone. Its geometry follows from the shapes.

    Raises KeyError or RuntimeError where the tensors are no CLIP vision transformer.
    """
    prefix = "visual."
    visual = {name.removeprefix(prefix): tensor.float() for name, tensor in state.items() if name.startswith(prefix)}
    visual = visual or {name: tensor.float() for name, tensor in state.items()}
    width, _, patch_size, _ = visual["conv1.weight"].shape
    with torch.device("meta"):
        tower = CLIPVision(
            grid=math.isqrt(len(visual["positional_embedding"]) - 1),
            patch_size=patch_size,
            width=width,
            layers=sum(bool(re.fullmatch(r"transformer\.resblocks\.\d+\.ln_1\.weight", name)) for name in visual),
            heads=width // head_dim,
            ffn_width=len(visual["transformer.resblocks.0.mlp.c_fc.bias"]),
            target_dim=visual["proj"].shape[1],
            quick_gelu=quick_gelu,
        )
    tower.load_state_dict(visual, assign=True)
    return tower
