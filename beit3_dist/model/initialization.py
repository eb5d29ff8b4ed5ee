"""Initial values: a function of (seed, parameter name) from a CPU generator, the same in every layout.

Two schemes, after reference implementations' intent rather than their order of calls:
- released architecture (sub-LayerNorm, from Magneto, Wang et al. 2022): matrices from a normal of deviation 0.02 cut
  at one deviation, then v, out, fc1 and fc2 scaled by sqrt(log(2 L)). The gain comes last: the released code applies
  it first and then overwrites it.
- paper's architecture (BEiT): the same small range, then the output matrices of layer l = 1..L (attention's out, fc2)
  divided by sqrt(2 l).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from beit3_dist.config import ModelConfig

SMALL = 0.02


def named_generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator of one parameter."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_small(value: Tensor, generator: torch.Generator) -> None:
    """Fills `value` from a normal of deviation 0.02 cut at one deviation.

    By the inverse of its distribution, so that each number takes one draw: torch's `trunc_normal_` draws all of them
    again until none lies outside, which takes minutes for the giant, and draws otherwise in other versions of torch.
    """
    inside = math.erf(math.sqrt(0.5))  # a normal's share within one deviation
    value.uniform_(-inside, inside, generator=generator).erfinv_()
    value.mul_(SMALL * math.sqrt(2)).clamp_(-SMALL, SMALL)  # the last rounding may lie outside


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial value of the parameter with this canonical name, float32 on the CPU."""
    value = torch.empty(shape)
    if name.endswith(".bias"):
        return value.zero_()
    if any("norm" in part for part in name.split(".")):
        return value.fill_(1.0)
    if config.sub_layernorm and name.endswith(("cls_token", "mask_token")):
        return value.zero_()
    if config.sub_layernorm and name == "language_embedding.words.weight":
        return value.normal_(std=config.width**-0.5, generator=named_generator(seed, name))
    draw_small(value, named_generator(seed, name))
    layer = re.match(r"(?:decoder\.|vision_embedding\.)?blocks\.(\d+)\.", name)
    if layer is None:
        return value
    if config.sub_layernorm and re.search(r"\.(v|out|fc1|fc2)\.", name):
        value *= math.sqrt(math.log(2 * config.layers))
    elif not config.sub_layernorm and re.search(r"\.(out|fc2)\.", name):
        value /= math.sqrt(2 * (int(layer[1]) + 1))
    return value


Values = Callable[[str, torch.Size], Tensor]
"""(canonical name, shape) -> the value of a parameter, float32 on the CPU."""


def zeros(name: str, shape: torch.Size) -> Tensor:
    """For a model that a checkpoint fills, which holds every element of it or is refused: drawing the giant's values
    takes minutes on every rank."""
    return torch.zeros(shape)


@torch.no_grad()
def materialize(
    module: nn.Module, values: Values, device: torch.device | str, dtype: torch.dtype = torch.float32, prefix: str = ""
) -> None:
    """Gives every parameter of a module built on the meta device its memory on `device` and its value; a frozen
    one stays frozen.

    `prefix` completes the module's own names to canonical ones.
    """
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = values(f"{prefix}{name}", parameter.shape).to(device, dtype)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, parameter.requires_grad))
