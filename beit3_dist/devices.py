"""Which kind of device a process computes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that leave no GPU; Slurm sets the last one."""
DRIVER = Path("/dev/nvidiactl")
"""There where a machine has an NVIDIA driver."""


def device_type() -> Literal["cuda", "cpu"]:
    """cuda where there is a GPU, unless DS_ACCELERATOR=cpu, DeepSpeed's variable, says otherwise; else cpu.

    Raises ValueError where a GPU is there or is asked for, but cannot be used: a run on the CPU would look like a slow
    one for hours.
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
    """Whether this machine shows a GPU, or is told to: not where CUDA_VISIBLE_DEVICES hides it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return DRIVER.exists() if visible is None else visible not in HIDDEN


def _reason() -> str:
    """Why torch has no GPU, in its own words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return "torch finds none"
