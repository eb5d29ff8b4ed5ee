"""AdamW over parameters in flat buffers. It has no gradients itself."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_dist.kernels.adamw.definition import Flat, Update, plain_adamw
from beit3_dist.kernels.registry import Case, Function, Operation, Sizes, register
from beit3_dist.kernels.triton import in_triton

UPDATE = Update(factor=0.5, lr=1e-2, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.05, steps=3)


def _wide(numbers: Tensor) -> Tensor:
    """A copy, at least in fp32."""
    return torch.empty_like(numbers, dtype=torch.promote_types(numbers.dtype, torch.float32)).copy_(numbers)


@torch.no_grad()
def _call(compute: Function, matrix: Tensor, vector: Tensor, *buffers: Tensor) -> list[Tensor]:
    """Of a matrix, of as large a one without a gradient, and of a vector; behind them the buffers are padded."""
    p, m, v = map(_wide, buffers)
    flat = Flat(p, m, v.square_(), torch.zeros_like(buffers[0]))
    compute(flat, [matrix, None, vector], [matrix.numel(), matrix.numel(), vector.numel()], UPDATE)
    return [flat.masters, flat.first, flat.second, flat.weights]


def _cases(sizes: Sizes) -> list[Case]:
    elements = 2 * sizes.tokens * sizes.width + sizes.width + 3
    return [Case([(sizes.tokens, sizes.width), (sizes.width,), *[(elements,)] * 3], _call, separate=False)]


register(Operation("adamw", plain_adamw, _cases, [in_triton(f"{__name__}.triton")]))
