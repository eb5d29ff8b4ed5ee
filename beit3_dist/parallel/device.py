"""What torch is told before a GPU computes anything."""

from __future__ import annotations

import os
from typing import Any

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


def prepare_device(deterministic: bool) -> None:
    """Memory in segments that grow: micro-batches of other lengths then leave no gaps that nothing fits in. What the
    environment says of the allocator stands.

    `deterministic`: from now on operations add up in a fixed order, and raise RuntimeError where they cannot.
    """
    os.environ.setdefault(ALLOCATOR, "expandable_segments:True")
    if deterministic:
        os.environ.setdefault(WORKSPACE, ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        deterministic_settings: Any = torch.utils.deterministic  # whose types are not known
        deterministic_settings.fill_uninitialized_memory = False  # nothing of ours reads what was not written
        torch.backends.cudnn.benchmark = False
