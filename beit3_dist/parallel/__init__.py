"""How a run is spread over processes."""

import os

import torch

from beit3_dist.devices import gpu_is_meant

# DeepSpeed picks its accelerator when it is imported, by the packages that it finds; the device itself knows better.
# Where a GPU is meant that cannot be used, `devices.device_type` says so before anything is computed.
if not torch.cuda.is_available() and not gpu_is_meant():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
