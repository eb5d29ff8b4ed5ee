"""Who computes the blocks of a model: `kernels` of the config, applied in one place."""

from __future__ import annotations

import os
import shutil

import torch

from beit3_dist.config import TrainingConfig, require
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.block import Block

OLDEST_TORCH = (2, 13)
"""That compiled blocks were tested with; older ones lack what they are asked for."""


def check_kernels(config: TrainingConfig) -> None:
    """Raises ValueError where the choice cannot run on this machine."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    require(
        config.kernels != "compiled" or version >= OLDEST_TORCH,
        f"kernels=compiled needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, not {torch.__version__}: "
        "use kernels=torch",
    )
    compiler = os.environ.get("CXX", "g++")  # what torch.compile calls
    require(
        config.kernels != "compiled" or shutil.which(compiler) is not None,
        f"kernels=compiled needs a C++ compiler, and {compiler} is not found: install g++, name another in the "
        "environment's CXX, or use kernels=torch",
    )


def use_kernels(model: BEiT3, choice: str) -> None:
    """Makes the blocks compute by `choice`. Call it once they are cut to the rank's slices and stages."""
    if choice == "compiled":
        from beit3_dist.parallel.compiled import CompiledForward  # needs a newer torch than all else

        for block in model.blocks.values():
            assert isinstance(block, Block)
            block.forward = CompiledForward(block)  # type: ignore[method-assign]
