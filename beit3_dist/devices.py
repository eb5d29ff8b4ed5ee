"""Which kind of device a process computes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

NO_GPU = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that leave no GPU; Slurm sets the last one."""
DRIVER = Path("/dev/nvidiactl")
"""Exists where a machine has an NVIDIA driver."""


def device_type() -> Literal["cuda", "cpu"]:
    """cuda where there is a GPU, unless DeepSpeed's variable DS_ACCELERATOR=cpu says otherwise; else cpu.

    Raises ValueError where there is a GPU, or one is asked for, that cannot be used: a run on the CPU in its place
    would pass for a slow one for hours.
    """
    wanted = os.environ.get("DS_ACCELERATOR") or None
    if wanted not in (None, "cuda", "cpu"):
        raise ValueError(f"DS_ACCELERATOR={wanted}: it is cuda or cpu here")
    if wanted == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda" or gpu_is_meant():
        raise ValueError(f"the GPU cannot be used ({_reason()}): mend that, or set DS_ACCELERATOR=cpu to do without")
    return "cpu"


def gpu_is_meant() -> bool:
    """Whether this process is meant to have a GPU: CUDA_VISIBLE_DEVICES names one, or, unset, there is a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return DRIVER.exists() if visible is None else visible not in NO_GPU


def _reason() -> str:
    """Why torch finds no GPU, in its own words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "torch finds none"
