"""What the kernels share: the shapes of their launches, and what they refuse."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

WARPS_A_PROCESSOR = 32
"""That run at the same time on a multiprocessor, half of what it can hold, where each thread has `REGISTERS`."""
REGISTERS = 64
"""At most, of a thread: more than the kernels need, but for GELU's slope, which lacks a few."""


def block_and_warps(width: int) -> tuple[int, int]:
    """The power of two that holds a row, and the warps for it: 8 elements a thread, one 16-byte load of bf16.

    Fixed, not tuned when training starts: the kernels wait for memory, and only a bad shape would slow them down.
    """
    block = triton.next_power_of_2(width)
    return block, min(WARPS_A_PROCESSOR, max(4, block // 256))


_compiled: dict[tuple[Any, ...], Any] = {}
"""Kernels as the driver takes them, by all that decides how they were compiled."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants): tensors, then numbers that fit 32 bits, then what is compiled in.

    Triton looks at each of 40 arguments whenever it starts a kernel, which takes longer than the kernel; here it does
    so once for each kind of arguments.
    """
    first: Tensor = arguments[0]
    if first.device.type != "cuda":  # Triton's interpreter
        kernel[grid](*arguments, **constants)
        return
    if first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            launch(kernel, grid, *arguments, **constants)
        return
    kinds = [
        (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else type(a)  # Triton compiles aligned loads
        for a in arguments
    ]
    key = (kernel, first.device.index, *kinds, *constants.items())
    known = _compiled.get(key)
    if known is None:
        _compiled[key] = kernel[grid](*arguments, **constants)
        return
    compiled_in = (constants[name] for name in kernel.arg_names[len(arguments) :])
    known[(*grid, 1, 1)[:3]](*arguments, *compiled_in)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for Triton's interpreter, which runs the programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def require_narrow(name: str, tensor: Tensor) -> None:
    """Raises ValueError for what fp32, in which all sums are kept, would make less precise."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{name} is {tensor.dtype}: the Triton kernels take bf16, fp16 and fp32; use the torch ones")
