"""Who computes what is no matrix product: `kernels` of the config, applied in one place."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from beit3_dist.config import require
from beit3_dist.kernels.gelu_layer_norm import GeluLayerNorm
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.varlen_attention import VARLEN_ATTENTION, find_varlen_attention
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.block import Block
from beit3_dist.model.head import Head

OLDEST_TORCH = (2, 10)
"""For compiled blocks: the first whose compiler takes all that parallel/compiled.py asks of it (a typical length for
dimensions that are unknown, kernels that no timing chooses, 32-bit indexes)."""


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
        _use_triton(model)


def _use_triton(model: BEiT3) -> None:
    """Blocks in few kernels; where they are cut over tensor ranks, their modules one by one."""
    from beit3_dist.kernels.triton import cross_entropy, gelu_layer_norm, layer_norm  # need triton
    from beit3_dist.parallel.fused import FusedForward

    name = find_varlen_attention() if torch.cuda.is_available() else None
    core = None if name is None else VARLEN_ATTENTION[name][1]
    for module in model.modules():
        if isinstance(module, GeluLayerNorm):
            module.compute = gelu_layer_norm.gelu_layer_norm
        elif isinstance(module, LayerNorm):
            module.compute = layer_norm.layer_norm
        elif type(module) is Head:
            module.forward = partial(_head_losses, module, cross_entropy.head_cross_entropy)  # type: ignore[method-assign]
        elif isinstance(module, Head):
            module.loss = cross_entropy.cross_entropy_in_place
    for block in model.blocks.values():
        assert isinstance(block, Block)
        if all(type(projection) is nn.Linear for projection in block.attention.out.values()):
            block.forward = FusedForward(block, core)  # type: ignore[method-assign]


def _head_losses(head: Head, compute: Callable[..., Tensor], hidden_MD: Tensor, targets: Tensor) -> Tensor:
    """`Head.forward`."""
    return compute(hidden_MD, head.weight, head.bias, targets)
