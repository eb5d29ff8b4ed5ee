"""What the kernels share: the shapes of their launches, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """How a program takes rows one by one."""

    block: int
    """The power of two that holds a row."""
    warps: int
    registers: int | None = None
    """At most, of a thread."""
    warps_a_processor: int = 0
    """That run at the same time on a multiprocessor with so many registers."""

    def programs(self, device: torch.device) -> int:
        """That run at the same time on the device."""
        return processors(device) * (self.warps_a_processor // self.warps)


@cache
def forward_shape(width: int) -> Shape:
    """32 elements a thread. Fixed, as all shapes here, and not tuned when training starts; measured on an H200, where
    a residual connection and its norm of 1408 take 4.0 TB/s so (8 elements a thread: 3.3) of a copy's 4.2."""
    block = triton.next_power_of_2(width)
    return Shape(block, min(32, max(2, block // 1024)))


@cache
def backward_shape(width: int) -> Shape:
    """16 elements a thread, whose sums over the rows take registers: 3.4 to 3.7 TB/s at 1408. Short rows have 8: 3.7 to
    3.9 TB/s at 768."""
    block = triton.next_power_of_2(width)
    if block < 2048:
        return Shape(block, 4, registers=64, warps_a_processor=32)
    return Shape(block, min(16, block // 512), registers=128, warps_a_processor=16)


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
