"""What the kernels in Triton share. Each is the file triton.py of an operation's folder, for CUDA devices.

Nothing imports those files unless they are to compute: Triton is a dependency of theirs alone.
"""

from __future__ import annotations

import os

import torch

from beit3_dist.kernels.registry import HALVES, Place, Version, installed


def in_triton(module: str, roundings: int = 1) -> Version:
    """The version of an operation that is in Triton, in this module."""
    return Version("triton", module, ("triton",), lacks, roundings)


def lacks(place: Place) -> str:
    """`Version.lacks` of all kernels in Triton."""
    if not installed("triton"):
        return "the package triton, which comes with CUDA builds of torch"
    if place.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "a CUDA device"
    return "" if place.dtype in (*HALVES, torch.float32) else "bf16, fp16 or fp32"
