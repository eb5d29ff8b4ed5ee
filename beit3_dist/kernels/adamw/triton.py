"""`plain_adamw` in one kernel: each number is read once and written once, gradients where autograd has left them.

A program takes CHUNK elements of one parameter. Which, and where the parameter's gradient lies, it reads from tables:
the one of addresses is made anew for each step, the others once for a list of sizes. All of it is computed in fp32, in
the order of torch's fused AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit3_dist.kernels.adamw.definition import Flat, Update
from beit3_dist.kernels.triton.launch import launch, require_narrow

CHUNK, BLOCK = 8192, 1024
"""Elements of a program, and at a time: 8 a thread, 16 bytes of bf16."""
ALIGNED = 8
"""Elements: where all sizes are multiples of it, a thread loads and stores as many at once."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _step_kernel(
    masters_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    address_ptr: tl.tensor,
    parameter_ptr: tl.tensor,
    begin_ptr: tl.tensor,
    start_ptr: tl.tensor,
    size_ptr: tl.tensor,
    factor: float,
    decay: float,
    beta1: float,
    beta2: float,
    step_size: float,
    second_scale: float,
    eps: float,
    GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """CHUNK elements of a parameter, or those up to its end. ALIGNED: what starts and sizes are multiples of."""
    parameter = tl.load(parameter_ptr + tl.program_id(0))
    begin = tl.multiple_of(tl.load(begin_ptr + tl.program_id(0)), CHUNK)
    start = tl.multiple_of(tl.load(start_ptr + parameter), ALIGNED)
    size = tl.multiple_of(tl.load(size_ptr + parameter), ALIGNED)
    address = tl.load(address_ptr + parameter)
    gradient_ptr = tl.multiple_of(address.to(tl.pointer_type(GRADIENT)), 2 * ALIGNED)
    for at in range(0, CHUNK, BLOCK):
        element = begin + at + tl.arange(0, BLOCK)
        inside = element < size
        here = start + element
        g = tl.load(gradient_ptr + element, mask=inside & (address != 0), other=0.0).to(tl.float32) * factor
        p = tl.load(masters_ptr + here, mask=inside, other=0.0)
        m = tl.load(first_ptr + here, mask=inside, other=0.0)
        v = tl.load(second_ptr + here, mask=inside, other=0.0)
        m = beta1 * m + (g - beta1 * g)
        v = beta2 * v + (g * g - beta2 * (g * g))
        p -= decay * p
        p -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), second_scale) + eps)
        tl.store(masters_ptr + here, p, mask=inside)
        tl.store(first_ptr + here, m, mask=inside)
        tl.store(second_ptr + here, v, mask=inside)
        tl.store(weights_ptr + here, p, mask=inside)


def addresses(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Where the gradients lie, int64 [parameters] on the device; 0 where there is none."""
    known = torch.tensor([0 if gradient is None else gradient.data_ptr() for gradient in gradients])
    return known.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else known


@lru_cache(maxsize=64)
def _tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int64: parameter and first element of each program; start in the flat buffers and size of each parameter."""
    programs = [(number, begin) for number, size in enumerate(sizes) for begin in range(0, size, CHUNK)]
    parameter, begin = torch.tensor(programs, dtype=torch.int64).reshape(-1, 2).to(device).t().contiguous().unbind()
    start = torch.tensor([0, *accumulate(sizes)][:-1], dtype=torch.int64, device=device)
    return parameter, begin, start, torch.tensor(sizes, dtype=torch.int64, device=device)


def adamw(flat: Flat, gradients: Sequence[Tensor | None], sizes: Sequence[int], update: Update) -> None:
    """`plain_adamw` of gradients of one type."""
    given = [None if gradient is None else gradient.contiguous() for gradient in gradients]  # they outlive the launch
    there = [gradient for gradient in given if gradient is not None]
    for gradient in there[:1]:
        require_narrow("the gradient", gradient)
    if flat.masters.dtype != torch.float32:
        raise ValueError(f"the masters are {flat.masters.dtype}: the Triton kernel takes fp32")
    device = flat.masters.device
    tables = _tables(tuple(sizes), device)
    if not len(tables[0]):
        return
    aligned = all(size % ALIGNED == 0 for size in sizes) and all(g.data_ptr() % (2 * ALIGNED) == 0 for g in there)
    launch(
        _step_kernel, (len(tables[0]),), flat.masters, flat.first, flat.second, flat.weights,
        addresses(given, device), *tables, update.factor, update.lr * update.weight_decay, update.beta1, update.beta2,
        update.step_size, update.second_scale, update.eps,
        GRADIENT=TYPES[there[0].dtype if there else torch.float32], CHUNK=CHUNK, BLOCK=BLOCK,
        ALIGNED=ALIGNED if aligned else 1,
    )  # fmt: skip
