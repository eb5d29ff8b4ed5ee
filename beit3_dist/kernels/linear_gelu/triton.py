"""A linear layer and the GELU behind it, whose backward pass makes the bias's gradient on its way.

GELU (Hendrycks and Gimpel 2016, the exact form) is x P(x) with P the normal distribution's cumulative function; its
slope is P(x) + x p(x) with p its density. Forward it is torch's, but where drop path comes with it. Both kernels take
16 bytes at a time, for which the compiler has to know the rows' width: with loads of 2 bytes a former one took 1.2 TB/s
on an H200, where torch's took 3.0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import gelu

from beit3_dist.kernels.triton.launch import launch, require_narrow
from beit3_dist.kernels.triton.normal import cumulative_and_density
from beit3_dist.kernels.triton.sums import STRIPE_COLUMNS, stripes, sum_programs

ROWS = 4
"""That a program takes at a time: more of them need too many registers."""


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rows: int,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPES: tl.constexpr,
) -> None:
    """A few rows' columns of one of STRIPES stripes a program."""
    column = tl.program_id(0) % STRIPES * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) // STRIPES * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # rows x width may pass 2^31
    here = row[:, None] * WIDTH + column[None, :]
    both = (row < rows)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(x_ptr + here, mask=both, other=0.0).to(tl.float32)
    keep = tl.load(keep_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y_ptr + here, x * cumulative_and_density(x)[0] * keep[:, None], mask=both)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    gradient_ptr: tl.tensor,
    x_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    of_x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: int,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEEP: tl.constexpr,
) -> None:
    """Some columns and every so-many-th few rows a program, which adds up what it writes."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)  # rows x width may pass 2^31
        here = row[:, None] * WIDTH + column[None, :]
        both = (row < rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + here, mask=both, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + here, mask=both, other=0.0).to(tl.float32)
        if KEEP:
            gradient *= tl.load(keep_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        cumulative, density = cumulative_and_density(x)
        gradient *= cumulative + x * density
        tl.store(of_x_ptr + here, gradient, mask=both)
        total += gradient
    tl.store(partial_ptr + tl.program_id(1) * WIDTH + column, tl.sum(total, 0), mask=inside)


def kept_gelu(x: Tensor, keep_T: Tensor) -> Tensor:
    """gelu(x) of which each row is multiplied by its factor. x: [rows, F]."""
    (rows, width), y = x.shape, torch.empty_like(x)
    stripes_of_row = triton.cdiv(width, STRIPE_COLUMNS)
    if rows:
        launch(
            _forward_kernel, (triton.cdiv(rows, ROWS) * stripes_of_row,), x, keep_T, y, rows,
            WIDTH=width, ROWS=ROWS, COLUMNS=STRIPE_COLUMNS, STRIPES=stripes_of_row,
        )  # fmt: skip
    return y


def gelu_backward(gradient: Tensor, x: Tensor, keep_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """gradient, x: [rows, F] -> the gradient of x, and its sum over the rows [F]: that of a bias in x."""
    rows, width = x.shape
    columns, programs = stripes(rows, width, x.device)
    of_x = torch.empty_like(x)
    partial = torch.empty(programs, 1, width, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel, (columns, programs), gradient.contiguous(), x, x if keep_T is None else keep_T, of_x, partial,
        rows, WIDTH=width, ROWS=ROWS, COLUMNS=STRIPE_COLUMNS, KEEP=keep_T is not None,
    )  # fmt: skip
    return of_x, sum_programs(partial, [(0, 0, programs)], x.dtype)[0]


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, keep_T: Tensor | None) -> Tensor:
        require_narrow("x", x)
        hidden = torch.addmm(bias, x, weight.t())
        keep_T = None if keep_T is None else keep_T.contiguous()
        ctx.save_for_backward(x, weight, hidden, keep_T)
        return gelu(hidden) if keep_T is None else kept_gelu(hidden, keep_T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, hidden, keep_T = ctx.saved_tensors
        of_hidden, of_bias = gelu_backward(gradient, hidden, keep_T)
        for_x, for_weight, *_ = ctx.needs_input_grad
        return of_hidden @ weight if for_x else None, of_hidden.t() @ x if for_weight else None, of_bias, None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, keep_T: Tensor | None = None) -> Tensor:
    """keep gelu(x W' + b). x: [T, D]; weight: [F, D]; bias: [F]; keep_T: [T], None: ones."""
    return _LinearGelu.apply(x, weight, bias, keep_T)
