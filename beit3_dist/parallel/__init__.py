"""How a run is spread over processes."""

import os

import torch

# DeepSpeed picks its accelerator when it is imported, by the packages that it finds; the device itself knows better.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
