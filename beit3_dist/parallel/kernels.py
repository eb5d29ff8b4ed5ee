"""Who computes what is no matrix product: `kernels` and `attention_kernel` of the config, applied in one place."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from beit3_dist.config import require
from beit3_dist.kernels.gelu_layer_norm import GeluLayerNorm
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.kernels.varlen_attention import VARLEN_ATTENTION
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.block import Block
from beit3_dist.model.head import Head

OLDEST_TORCH = (2, 10)
"""For compiled blocks: the first whose compiler takes all that parallel/compiled.py asks of it (a typical length for
dimensions that are unknown, kernels that no timing chooses, 32-bit indexes)."""


def chosen_kernels(choice: str) -> str:
    """Who computes, where `kernels` leaves it open: on CUDA what was fastest there, on the CPU torch."""
    if choice != "auto":
        return choice
    return "triton" if torch.cuda.is_available() and _installed("triton") else "torch"


def chosen_attention(choice: str, kernels: str, dtype: torch.dtype, head_dim: int) -> str:
    """Who computes attention's core, where `attention_kernel` leaves it open. `kernels`: as chosen."""
    narrow = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0  # what the kernels take
    if choice != "auto" or kernels != "triton" or not narrow or not torch.cuda.is_available():
        return "padded" if choice == "auto" else choice
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    usable = (name for name, it in VARLEN_ATTENTION.items() if _installed(it.module) and (hopper or not it.hopper))
    return next(usable, "padded")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def check_kernels(kernels: str, attention: str = "auto", precision: str = "bf16") -> None:
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
            _installed("triton"),
            "kernels=triton needs the package triton, which comes with CUDA builds of torch: use kernels=torch",
        )
        require(
            torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
            "kernels=triton needs a CUDA device: use kernels=torch",
        )
    if attention in VARLEN_ATTENTION:
        it = VARLEN_ATTENTION[attention]
        require(
            chosen_kernels(kernels) == "triton" and precision == "bf16" and torch.cuda.is_available(),
            f"attention_kernel={attention} needs kernels=triton, precision=bf16 and a CUDA device: use "
            "attention_kernel=padded",
        )
        require(_installed(it.module), f"attention_kernel={attention} needs {it.needs}: use attention_kernel=auto")


def use_kernels(model: BEiT3, choice: str, attention: str = "auto") -> None:
    """Makes the model compute by `kernels` and `attention_kernel`. Call it once it is cut to the rank's slices and
    stages."""
    choice = chosen_kernels(choice)
    if choice == "compiled":
        from beit3_dist.parallel.compiled import CompiledForward  # needs a newer torch than all else

        for block in model.blocks.values():
            assert isinstance(block, Block)
            block.forward = CompiledForward(block)  # type: ignore[method-assign]
    elif choice == "triton":
        dtype, head_dim = next(model.parameters()).dtype, model.config.width // model.config.heads
        _use_triton(model, chosen_attention(attention, choice, dtype, head_dim))


def _use_triton(model: BEiT3, attention: str) -> None:
    """Blocks in few kernels; where they are cut over tensor ranks, their modules one by one."""
    from beit3_dist.kernels.triton import cross_entropy, gelu_layer_norm, layer_norm  # need triton
    from beit3_dist.parallel.fused import FusedForward

    core = None if attention == "padded" else VARLEN_ATTENTION[attention].compute
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
        if all(type(projection) is Linear for projection in block.attention.out.values()):
            block.forward = FusedForward(block, core)  # type: ignore[method-assign]


def _head_losses(head: Head, compute: Callable[..., Tensor], hidden_MD: Tensor, targets: Tensor) -> Tensor:
    """`Head.forward`."""
    return compute(hidden_MD, head.weight, head.bias, targets)
