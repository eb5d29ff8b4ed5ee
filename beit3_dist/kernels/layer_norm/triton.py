"""LayerNorm (Ba et al. 2016) over the last dimension, of x or of GELU(x): one kernel forward, one backward.

With n = (v - mean(v)) s, s = 1 / sqrt(var(v) + eps) and y = w n + b, where v is x or GELU(x), the gradients are

    dv = s (w dy - mean(w dy) - n mean(w dy n)),   dw = sum over rows of dy n,   db = sum over rows of dy,

and dx = dv or dv GELU'(x). GELU (Hendrycks and Gimpel 2016, the exact form) is x P(x) with P the normal distribution's
cumulative function; its slope is P(x) + x p(x) with p its density. All of it is computed in fp32. A row of v is never
written to memory: what lives between the passes is x, and the mean and s of each row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit3_dist.kernels.triton.launch import backward_shape, forward_shape, launch, require_narrow
from beit3_dist.kernels.triton.normal import cumulative_and_density
from beit3_dist.kernels.triton.sums import sum_programs


@triton.jit
def _forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)  # rows x width may pass 2^31
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value *= cumulative_and_density(value)[0]
    mean = tl.sum(value, 0) / WIDTH
    centred = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, centred * scale * weight + bias, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)


@triton.jit(do_not_specialize=["rows"])  # the rows of an expert differ from step to step: one compilation for all
def _backward_kernel(
    gradient_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    of_x_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: int,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    """Every so-many-th row a program, which adds up the gradients of weight and bias, and x's own, over its rows."""
    first = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    sum_of_x = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, tl.num_programs(0)):
        row = first + start
        here = inside & (row < rows)
        x = tl.load(x_ptr + row * WIDTH + column, mask=here, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_ptr + row * WIDTH + column, mask=here, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        if GELU:
            cumulative, density = cumulative_and_density(x)
            normal = (x * cumulative - mean) * scale
        else:
            normal = (x - mean) * scale
        of_weight += gradient * normal
        of_bias += gradient
        weighted = gradient * weight
        of_x = scale * (weighted - tl.sum(weighted, 0) / WIDTH - normal * (tl.sum(weighted * normal, 0) / WIDTH))
        if GELU:
            of_x *= cumulative + x * density
        tl.store(of_x_ptr + row * WIDTH + column, of_x, mask=here)
        if KINDS == 3:
            sum_of_x += tl.where(here, of_x, 0.0)
    sums_ptr = partial_ptr + first * KINDS * WIDTH + column
    tl.store(sums_ptr, of_weight, mask=inside)
    tl.store(sums_ptr + WIDTH, of_bias, mask=inside)
    if KINDS == 3:
        tl.store(sums_ptr + 2 * WIDTH, sum_of_x, mask=inside)


def normalize_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, of_gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x: [..., width], contiguous -> y, and fp32 [rows]: the mean and scale of each row."""
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x)
    mean, scale = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    shape = forward_shape(width)
    if rows:  # no device starts nothing
        launch(
            _forward_kernel, (rows,), x, weight, bias, y, mean, scale, eps,
            WIDTH=width, BLOCK=shape.block, GELU=of_gelu, num_warps=shape.warps,
        )  # fmt: skip
    return y, mean, scale


def normalize_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, of_gelu: bool, sum_of_x: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gradient of x, and those of weight and bias [width]; with `sum_of_x` also x's own, summed over its rows."""
    (width,), (rows,), kinds = weight.shape, mean.shape, 2 + sum_of_x
    shape = backward_shape(width)
    programs = min(rows, shape.programs(x.device))
    of_x = torch.empty_like(x)
    partial = torch.empty(programs, kinds, width, dtype=torch.float32, device=x.device)
    if rows:
        launch(
            _backward_kernel, (programs,), gradient.contiguous(), x, weight, mean, scale, of_x, partial, rows,
            KINDS=kinds, WIDTH=width, BLOCK=shape.block, GELU=of_gelu, num_warps=shape.warps, maxnreg=shape.registers,
        )  # fmt: skip
    return of_x, sum_programs(partial, [(kind, 0, programs) for kind in range(kinds)], weight.dtype)


class Normalize(torch.autograd.Function):
    """LayerNorm of x, or of GELU(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, of_gelu: bool) -> Tensor:
        require_narrow("x", x)
        width = x.shape[-1]
        if not weight.shape == bias.shape == (width,):
            raise ValueError(f"x is {width} wide, but weight has shape {[*weight.shape]} and bias {[*bias.shape]}")
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        y, mean, scale = normalize_forward(x, weight, bias, eps, of_gelu)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.of_gelu = of_gelu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, scale = ctx.saved_tensors
        of_x, (of_weight, of_bias) = normalize_backward(gradient, x, weight, mean, scale, ctx.of_gelu)
        return of_x, of_weight, of_bias, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x). x: [..., D]; weight, bias: [D]."""
    return Normalize.apply(x, weight, bias, eps, False)
