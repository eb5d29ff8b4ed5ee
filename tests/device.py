"""The device that tests compute on where they let it be chosen."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("BEIT3_TEST_DEVICE", "cpu"))
"""BEIT3_TEST_DEVICE: cpu or cuda. tests/gpu/run.sh sets it; all that is not in tests/gpu is for the CPU by default."""
ON_GPU = DEVICE.type == "cuda"
