"""Cross-entropy that turns the logits [rows, classes] into their gradient in place, with one reading from memory.

A program goes over its row twice, block by block. First the largest logit m and s = sum of exp(logit - m) are gathered
together (Milakov and Gimelshein 2018): where a block raises m, what was summed before shrinks by exp(old m - new m).
Then the logits, which are still in the cache, become the loss's gradient softmax - [class == target]. The backward
pass only multiplies each row by its factor. All of it is computed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from beit3_dist.kernels.triton.launch import launch, require_narrow
from beit3_dist.kernels.triton.sums import column_sums

BLOCK = 4096
"""Classes at a time; fewer if there are fewer."""
WARPS = 8
"""For a block: 16 elements a thread."""


@triton.jit
def _forward_kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    out_ptr: tl.tensor,
    CLASSES: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)  # rows x classes may pass 2^31
    row_ptr = logits_ptr + row * STRIDE
    column = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    # A target that is no class makes the loss NaN.
    known = (target >= 0) & (target < CLASSES)
    picked = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    if BIAS:
        picked += tl.load(bias_ptr + target, mask=known, other=0.0).to(tl.float32)

    top = -3.4028234663852886e38  # not -inf: a block may be all -inf, and their difference is NaN
    total = 0.0
    for start in range(0, CLASSES, BLOCK):
        inside = start + column < CLASSES
        logits = tl.load(row_ptr + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        if BIAS:
            logits += tl.load(bias_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        before = top
        top = tl.maximum(before, tl.max(logits, 0))
        total = total * tl.exp(before - top) + tl.sum(tl.exp(logits - top), 0)

    share = 1.0 / total
    earlier = tl.zeros([BLOCK], tl.int32)
    for start in range(0, CLASSES, BLOCK):
        inside = start + column < CLASSES
        logits = tl.load(row_ptr + start + column, mask=inside, other=-float("inf")).to(tl.float32)
        if BIAS:
            logits += tl.load(bias_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        # The prediction is the first of the largest: the target's if none before it is as large.
        earlier |= ((logits == top) & (start + column < target)).to(tl.int32)
        gradient = tl.exp(logits - top) * share - tl.where(start + column == target, 1.0, 0.0)
        tl.store(row_ptr + start + column, gradient, mask=start + column < STRIDE)  # 0 behind the classes

    tl.store(out_ptr + row, tl.log(total) + (top - picked))
    first = tl.max(earlier, 0) == 0
    tl.store(out_ptr + tl.num_programs(0) + row, ((picked == top) & first).to(tl.float32))


@triton.jit
def _scale_kernel(
    gradient_ptr: tl.tensor, factor_ptr: tl.tensor, CLASSES: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """One block of a row a program: the row is multiplied by its factor."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < CLASSES
    factor = tl.load(factor_ptr + row)
    here = gradient_ptr + row * STRIDE + column
    tl.store(here, tl.load(here, mask=inside).to(tl.float32) * factor, mask=inside)


def _to_gradient(logits: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The losses and right predictions [2, M] of logits [M, classes], which become the gradient. Rows may be apart."""
    (rows, classes), stride = logits.shape, logits.stride(0)
    out = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    if rows:  # no device starts nothing
        launch(
            _forward_kernel, (rows,), logits, logits if bias is None else bias, targets.contiguous(), out,
            CLASSES=classes, STRIDE=stride, BLOCK=_block(classes), BIAS=bias is not None, num_warps=WARPS,
        )  # fmt: skip
    return out


def _scale(gradient: Tensor, factors: Tensor) -> None:
    """Multiplies each row [classes] by its factor."""
    (rows, classes), stride, block = gradient.shape, gradient.stride(0), _block(gradient.shape[1])
    if rows:
        launch(
            _scale_kernel, (rows, triton.cdiv(classes, block)), gradient, factors.contiguous(),
            CLASSES=classes, STRIDE=stride, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip


def _block(classes: int) -> int:
    return min(BLOCK, triton.next_power_of_2(classes))


def _check(logits: Tensor, targets: Tensor) -> None:
    require_narrow("logits", logits)
    if targets.shape != (len(logits),):
        raise ValueError(f"logits have {len(logits)} rows, but targets have shape {[*targets.shape]}")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        _check(logits, targets)
        ctx.gradient = logits.detach().contiguous()
        return _to_gradient(ctx.gradient, None, targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_2M: Tensor) -> tuple[Tensor, None]:
        gradient = _once(ctx)
        _scale(gradient, gradient_2M[0])
        return gradient, None


def _once(ctx: Any) -> Tensor:
    if ctx.gradient is None:
        raise RuntimeError("this cross-entropy has gone backward before: its logits are overwritten")
    gradient, ctx.gradient = ctx.gradient, None
    return gradient


def cross_entropy_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """[2, M] in fp32: cross-entropies, and 1 where the largest logit (of equal ones the first) is the target's.

    logits: [M, classes], which nobody else reads: they are overwritten. targets: int64 [M]. Goes backward once.
    """
    return _CrossEntropy.apply(logits, targets)


ALIGNED = 64
"""Logits that lie in a row are a multiple of so many: for 64,010 there are only slow matrix products."""


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        padded = _pad(weight)
        ctx.gradient = hidden @ padded.t()
        logits = ctx.gradient[:, : len(weight)]
        _check(logits, targets)
        ctx.save_for_backward(hidden, padded)  # the head goes backward next, so that a copy does not stay for long
        ctx.classes = len(weight)
        return _to_gradient(logits, bias, targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_2M: Tensor) -> tuple[Tensor | None, ...]:
        hidden, padded = ctx.saved_tensors
        gradient, classes, factors = _once(ctx), ctx.classes, gradient_2M[0].contiguous()
        # Of a row's factor the products' other sides take care, which are far smaller than the logits' gradient.
        for_hidden, for_weight, *_ = ctx.needs_input_grad
        of_hidden = of_weight = None
        if for_hidden:
            of_hidden = (gradient @ padded).mul_(factors[:, None])
        if for_weight:
            scaled = torch.mul(hidden, factors[:, None], out=torch.empty_like(hidden))
            of_weight = (gradient.t() @ scaled)[:classes]  # 0 behind them
        return of_hidden, of_weight, column_sums(gradient[:, :classes], factors), None


def _pad(weight: Tensor) -> Tensor:
    """The weights [classes, D] and rows of zeros, an aligned number of rows in all; where there are zeros a copy, which
    costs little beside the products."""
    zeros = -len(weight) % ALIGNED
    return pad(weight, (0, 0, 0, zeros)) if zeros else weight


def head_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy_in_place` of the logits hidden W' + b, beside which columns of zeros make up an aligned number.

    hidden: [M, D]; weight: [classes, D]; bias: [classes]; targets: int64 [M]. The bias is added in fp32.
    """
    return _HeadCrossEntropy.apply(hidden, weight, bias, targets)
