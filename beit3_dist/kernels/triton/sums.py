"""Sums over rows: the gradients of biases and of LayerNorms' weights.

A sum over many rows is made in two steps, without atomic additions, so that it is the same at every run: each program
adds up its rows in fp32, then `sum_programs` adds up the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit3_dist.kernels.triton.launch import launch, processors

ROWS, COLUMNS = 32, 64
"""Of the sums that a program of `sum_programs` takes at a time."""


@triton.jit(do_not_specialize=["code0", "code1", "code2", "code3", "code4", "code5", "code6", "code7", "code8"])
def _sum_kernel(
    partial_ptr: tl.tensor,
    out_ptr: tl.tensor,
    code0: int,
    code1: int,
    code2: int,
    code3: int,
    code4: int,
    code5: int,
    code6: int,
    code7: int,
    code8: int,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of one sum a program. A code is kind + 4 x first + 2^17 x end of the programs to add up."""
    wanted = tl.program_id(0)
    code = tl.where(wanted == 0, code0, code8)
    code = tl.where(wanted == 1, code1, code)
    code = tl.where(wanted == 2, code2, code)
    code = tl.where(wanted == 3, code3, code)
    code = tl.where(wanted == 4, code4, code)
    code = tl.where(wanted == 5, code5, code)
    code = tl.where(wanted == 6, code6, code)
    code = tl.where(wanted == 7, code7, code)
    kind, first, end = code % 4, (code // 4) % 32768, code // 131072
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row[:, None].to(tl.int64) * KINDS + kind) * WIDTH + column[None, :]
        total += tl.load(partial_ptr + here, mask=(row < end)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + wanted * WIDTH + column, tl.sum(total, 0), mask=inside)


MOST_SUMS = 9
MOST_PROGRAMS = 1 << 14


def sum_programs(partial: Tensor, wanted: list[tuple[int, int, int]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """partial: fp32 [programs, kinds, width]; wanted: (kind, first, end) -> for each, partial[first:end, kind].sum(0)
    of type `dtype`; zeros where end = first."""
    programs, kinds, width = partial.shape
    if len(wanted) > MOST_SUMS or programs >= MOST_PROGRAMS:
        raise ValueError(f"{len(wanted)} sums over {programs} programs are more than {MOST_SUMS} over {MOST_PROGRAMS}")
    codes = [kind + 4 * first + 131072 * end for kind, first, end in wanted] + [0] * (MOST_SUMS - len(wanted))
    out = torch.empty(len(wanted), width, dtype=dtype, device=partial.device)
    launch(
        _sum_kernel, (len(wanted), triton.cdiv(width, COLUMNS)), partial, out, *codes,
        KINDS=kinds, WIDTH=width, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return out.unbind(0)


@triton.jit(do_not_specialize=["rows"])
def _columns_kernel(
    x_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: int,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTORS: tl.constexpr,
) -> None:
    """Some columns and every so-many-th few rows a program."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        here = row[:, None] * STRIDE + column[None, :]
        x = tl.load(x_ptr + here, mask=(row < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if FACTORS:
            x *= tl.load(factor_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        total += x
    tl.store(partial_ptr + tl.program_id(1) * WIDTH + column, tl.sum(total, 0), mask=inside)


STRIPE_COLUMNS = 512
"""Of a matrix that a program takes at a time: loads of a kilobyte of bf16."""
STRIPE_ROWS = 8
"""That it takes at a time where it does nothing but add them up."""
PROGRAMS_A_PROCESSOR = 8


def stripes(rows: int, width: int, device: torch.device) -> tuple[int, int]:
    """The grid of programs that each take some columns of many rows: (stripes of columns, programs of a stripe)."""
    columns = triton.cdiv(width, STRIPE_COLUMNS)
    most = max(1, processors(device) * PROGRAMS_A_PROCESSOR // columns)
    return columns, min(most, max(1, triton.cdiv(rows, STRIPE_ROWS)))


def column_sums(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """(factors[:, None] * x).sum(0) of a matrix [rows, width], added up in fp32. Rows may be apart. factors: [rows];
    None: ones."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    columns, programs = stripes(rows, width, x.device)
    partial = torch.empty(programs, 1, width, dtype=torch.float32, device=x.device)
    launch(
        _columns_kernel, (columns, programs), x, x if factors is None else factors.contiguous(), partial, rows,
        WIDTH=width, STRIDE=x.stride(0), ROWS=STRIPE_ROWS, COLUMNS=STRIPE_COLUMNS, FACTORS=factors is not None,
    )  # fmt: skip
    return sum_programs(partial, [(0, 0, programs)], x.dtype)[0]
