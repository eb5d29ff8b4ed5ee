"""Who computes what is no matrix product: `kernels` of the config, applied in one place."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from beit3_dist.config import require
from beit3_dist.kernels.gelu_layer_norm import GeluLayerNorm
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.block import Block
from beit3_dist.model.head import Head

OLDEST_TORCH = (2, 13)
"""That compiled blocks were tested with; older ones lack what they are asked for."""


def check_kernels(kernels: str) -> None:
    """Raises ValueError where the choice cannot run on this machine."""
    if kernels == "compiled":
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        require(
            version >= OLDEST_TORCH,
            f"kernels=compiled needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, not {torch.__version__}: "
            "use kernels=torch",
        )
        compiler = os.environ.get("CXX", "g++")  # what torch.compile calls
        require(
            shutil.which(compiler) is not None,
            f"kernels=compiled needs a C++ compiler, and {compiler} is not found: install g++, name another in the "
            "environment's CXX, or use kernels=torch",
        )
    if kernels == "triton":
        require(
            importlib.util.find_spec("triton") is not None,
            "kernels=triton needs the package triton, which comes with CUDA builds of torch: use kernels=torch",
        )
        require(
            torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
            "kernels=triton needs a CUDA device: use kernels=torch",
        )


def use_kernels(model: BEiT3, choice: str) -> None:
    """Makes the model compute by `choice`. Call it once it is cut to the rank's slices and stages."""
    if choice == "compiled":
        from beit3_dist.parallel.compiled import CompiledForward  # needs a newer torch than all else

        for block in model.blocks.values():
            assert isinstance(block, Block)
            block.forward = CompiledForward(block)  # type: ignore[method-assign]
    elif choice == "triton":
        from beit3_dist.kernels.triton import cross_entropy, gelu_layer_norm, layer_norm  # need triton

        for module in model.modules():
            if isinstance(module, GeluLayerNorm):
                module.compute = gelu_layer_norm.gelu_layer_norm
            elif isinstance(module, LayerNorm):
                module.compute = layer_norm.layer_norm
            elif isinstance(module, Head):
                module.loss = cross_entropy.cross_entropy_in_place
