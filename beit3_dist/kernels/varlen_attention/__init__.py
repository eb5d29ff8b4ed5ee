"""Attention over samples of different lengths. On CUDA one kernel takes all samples: that of the package flash-attn-4
where it is installed, else the one in torch; both compute a head of 88 numbers as one of 96."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from beit3_dist.kernels.registry import HALVES, Case, Function, Operation, Place, Sizes, Version, installed, register
from beit3_dist.kernels.varlen_attention.definition import plain_varlen_attention


def _lacks(package: str, module: str, capability: tuple[int, int], place: Place) -> str:
    """`module`: one of the package's. `capability`: of the oldest GPU, in CUDA's numbers."""
    if place.device != "cuda" or place.dtype not in HALVES:
        return "bf16 or fp16 on a CUDA device"
    if place.width % 8:
        return "heads of a multiple of 8 numbers"
    if not installed(module):
        return package
    return "" if torch.cuda.get_device_capability() >= capability else "an H100 or newer"


def _call(compute: Function, qkv: Tensor) -> list[Tensor]:
    """Samples of uneven lengths."""
    ends, rows = [0], len(qkv)
    while ends[-1] < rows:
        ends.append(ends[-1] + min(512, (rows - ends[-1] + 1) // 2))
    return [compute(qkv, torch.tensor(ends, dtype=torch.int32, device=qkv.device), min(512, rows))]


def _cases(sizes: Sizes) -> list[Case]:
    heads = sizes.heads
    return [Case([(sizes.tokens, 3, heads, sizes.width // heads)], _call, separate=False)]


_FLASH = partial(_lacks, "the package flash-attn-4", "flash_attn.cute", (9, 0))
_VARLEN = partial(_lacks, "torch 2.10 or newer", "torch.nn.attention.varlen", (0, 0))
VARLEN_ATTENTION = register(
    Operation(
        "varlen_attention",
        plain_varlen_attention,
        _cases,
        [
            Version("flash", f"{__name__}.flash", lacks=_FLASH, roundings=2),
            Version("varlen", f"{__name__}.varlen", lacks=_VARLEN, roundings=2),
        ],
    )
)
"""The config's `attention_kernel` names its versions."""
