"""`plain_residual_norm` in one kernel forward and one backward, with a small one that ends the sums over the tokens.

With n = (r - mean(r)) s, s = 1 / sqrt(var(r) + eps), and dr the gradient that comes back to r from elsewhere, the
gradients are

    dx = dr + s (w dy - mean(w dy) - n mean(w dy n)),   dbranch = keep dx,
    dw = sum over tokens of dy n,   dbias of the norm = sum of dy,   dbias of the branch = sum of dbranch.

A token's expert follows from where it lies: the tokens are at most four segments, and an expert has some neighbouring
ones. In the backward pass each program walks through tokens of one segment and keeps three sums; `_sum_kernel` adds up
the programs', in a fixed order. All of it is computed in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit3_dist.kernels.residual_norm.definition import Branch, Norms
from beit3_dist.kernels.triton.launch import backward_shape, forward_shape, launch, require_narrow
from beit3_dist.kernels.triton.sums import sum_programs

SEGMENTS = 4

BRANCH_MOVED, Y_MOVED, GATHERED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""PLACE of the kernels: what lies at `place`, the branch, y, or x, which then nobody else reads; 0 where all lies in
the order of the tokens."""

KEPT = tl.constexpr(2)
"""KEEP of the kernels: the factors are in the branch already, not of its bias. 1: they are not; 0: there are none."""


@triton.jit
def _pick(segment: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """The one of a segment."""
    return tl.where(segment < 2, tl.where(segment == 0, a, b), tl.where(segment == 2, c, d))


@triton.jit(do_not_specialize=["end0", "end1", "end2", "start1", "start2", "start3"])
def _forward_kernel(
    x_ptr: tl.tensor,
    branch0: tl.tensor,
    branch1: tl.tensor,
    branch2: tl.tensor,
    branch3: tl.tensor,
    added0: tl.tensor,
    added1: tl.tensor,
    added2: tl.tensor,
    added3: tl.tensor,
    keep_ptr: tl.tensor,
    place_ptr: tl.tensor,
    weight0: tl.tensor,
    weight1: tl.tensor,
    weight2: tl.tensor,
    weight3: tl.tensor,
    bias0: tl.tensor,
    bias1: tl.tensor,
    bias2: tl.tensor,
    bias3: tl.tensor,
    r_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    end0: int,
    end1: int,
    end2: int,
    start1: int,
    start2: int,
    start3: int,
    eps: float,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BRANCH: tl.constexpr,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
    PLACE: tl.constexpr,
) -> None:
    """One token a program."""
    row = tl.program_id(0).to(tl.int64)  # rows x width may pass 2^31
    segment = (row >= end0).to(tl.int32) + (row >= end1).to(tl.int32) + (row >= end2).to(tl.int32)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row
    if PLACE:
        place = tl.load(place_ptr + row)
    value = tl.load(x_ptr + (place if PLACE == GATHERED else row) * WIDTH + column, mask=inside, other=0.0)
    if BRANCH:
        branch_ptr = _pick(segment, branch0, branch1, branch2, branch3)
        first = _pick(segment, 0, start1, start2, start3)
        there = (place if PLACE == BRANCH_MOVED else row) - first
        branch = tl.load(branch_ptr + there * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        added_ptr = _pick(segment, added0, added1, added2, added3)
        added = tl.load(added_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            keep = tl.load(keep_ptr + row).to(tl.float32)
            added *= keep
            if KEEP != KEPT:
                branch *= keep
        branch += added
        value = (value.to(tl.float32) + branch).to(r_ptr.dtype.element_ty)
        tl.store(r_ptr + row * WIDTH + column, value, mask=inside)
    if NORM:
        value = value.to(tl.float32)  # of what was stored: the backward pass reads no other
        mean = tl.sum(value, 0) / WIDTH
        centred = tl.where(inside, value - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
        weight = tl.load(_pick(segment, weight0, weight1, weight2, weight3) + column, mask=inside, other=0.0)
        bias = tl.load(_pick(segment, bias0, bias1, bias2, bias3) + column, mask=inside, other=0.0)
        normal = centred * scale * weight.to(tl.float32) + bias.to(tl.float32)
        tl.store(y_ptr + (place if PLACE == Y_MOVED else row) * WIDTH + column, normal, mask=inside)
        tl.store(mean_ptr + row, mean)
        tl.store(scale_ptr + row, scale)


@triton.jit(
    do_not_specialize=[
        "end0", "end1", "end2", "rows", "start1", "start2", "start3", "programs0", "programs1", "programs2", "programs",
    ]
)  # fmt: skip
def _backward_kernel(
    of_r_ptr: tl.tensor,
    of_y0: tl.tensor,
    of_y1: tl.tensor,
    of_y2: tl.tensor,
    of_y3: tl.tensor,
    r_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    keep_ptr: tl.tensor,
    place_ptr: tl.tensor,
    weight0: tl.tensor,
    weight1: tl.tensor,
    weight2: tl.tensor,
    weight3: tl.tensor,
    of_x_ptr: tl.tensor,
    of_branch_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    end0: int,
    end1: int,
    end2: int,
    rows: int,
    start1: int,
    start2: int,
    start3: int,
    programs0: int,
    programs1: int,
    programs2: int,
    programs: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BRANCH: tl.constexpr,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
    PLACE: tl.constexpr,
) -> None:
    """Every so-many-th token of a segment a program. `programs0` ...: where the next segment's programs begin."""
    program = tl.program_id(0)
    segment = (
        (program >= programs0).to(tl.int32) + (program >= programs1).to(tl.int32) + (program >= programs2).to(tl.int32)
    )
    lowest = _pick(segment, 0, end0, end1, end2).to(tl.int64)
    highest = _pick(segment, end0, end1, end2, rows)
    before = _pick(segment, 0, programs0, programs1, programs2)
    stride = _pick(segment, programs0, programs1, programs2, programs) - before
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    of_bias = tl.zeros([BLOCK], tl.float32)
    of_added = tl.zeros([BLOCK], tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    if NORM:
        weight_ptr = _pick(segment, weight0, weight1, weight2, weight3)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        of_y_ptr = _pick(segment, of_y0, of_y1, of_y2, of_y3)
        first = _pick(segment, 0, start1, start2, start3)
    for row in range(lowest + program - before, highest, stride):
        place = row
        if PLACE:
            place = tl.load(place_ptr + row)
        if PLACE == GATHERED:
            gradient = tl.zeros([BLOCK], tl.float32)
        else:
            gradient = tl.load(of_r_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            where = (place if PLACE == Y_MOVED else row) - first
            of_y = tl.load(of_y_ptr + where * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
            here = (place if PLACE == GATHERED else row) * WIDTH + column
            r = tl.load(r_ptr + here, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + row)
            normal = (r - tl.load(mean_ptr + row)) * scale
            of_weight += of_y * normal
            of_bias += of_y
            weighted = of_y * weight
            mean_of_weighted = tl.sum(weighted, 0) / WIDTH
            mean_of_product = tl.sum(weighted * normal, 0) / WIDTH
            gradient += scale * (weighted - mean_of_weighted - normal * mean_of_product)
            tl.store(of_x_ptr + here, gradient, mask=inside)
        if BRANCH:
            if KEEP:
                gradient *= tl.load(keep_ptr + row).to(tl.float32)
            if KEEP == 1 or PLACE == BRANCH_MOVED:
                there = place if PLACE == BRANCH_MOVED else row
                tl.store(of_branch_ptr + there * WIDTH + column, gradient, mask=inside)
            of_added += gradient
    sums_ptr = partial_ptr + program.to(tl.int64) * 3 * WIDTH + column
    if NORM:
        tl.store(sums_ptr, of_weight, mask=inside)
        tl.store(sums_ptr + WIDTH, of_bias, mask=inside)
    if BRANCH:
        tl.store(sums_ptr + 2 * WIDTH, of_added, mask=inside)


@dataclass(frozen=True)
class _Plan:
    """How the tokens of experts are four segments, and which programs of the backward pass walk through which."""

    ends: list[int]
    """Where the segments end; the last ends are equal where there are fewer."""
    branch: list[int]
    """Expert of each segment among those that made the branch."""
    norm: list[int]
    """The same among those whose norms come."""
    branch_starts: list[int]
    """First token of the slice that each segment is in."""
    norm_starts: list[int]
    programs: list[int]
    """Where the programs of the next segment begin."""
    sums: list[tuple[int, int, int]]
    """(kind, first, end) of the programs' sums: of each branch's bias, of each norm's weight, of each norm's bias."""


@lru_cache(maxsize=256)
def _plan(rows: int, branch_sizes: tuple[int, ...], norm_sizes: tuple[int, ...], most: int) -> _Plan:
    """`most`: programs that run at the same time."""
    for name, sizes in (("branch", branch_sizes), ("norms", norm_sizes)):
        if sizes and sum(sizes) != rows:
            raise ValueError(f"x has {rows} tokens, but {name} {sum(sizes)}")
    inner = sorted({end for sizes in (branch_sizes, norm_sizes) for end in accumulate(sizes[:-1])})
    if len(inner) >= SEGMENTS:
        raise ValueError(f"the experts' tokens are {len(inner) + 1} segments, but at most {SEGMENTS} are possible")
    ends = inner + [rows] * (SEGMENTS - len(inner))
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    programs = list(accumulate(min(n, -(-n * most // max(rows, 1))) for n in lengths))

    def of(sizes: tuple[int, ...]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """Expert of each segment, its first token, and the programs of each expert."""
        last = list(accumulate(sizes))
        # Of an empty segment it does not matter which; an empty expert has no segment at all.
        experts = [next((e for e, end in enumerate(last) if end >= stop and sizes[e]), 0) for stop in ends]
        first, spans = [0, *programs], []
        for expert in range(len(sizes)):
            mine = [s for s in range(SEGMENTS) if lengths[s] and experts[s] == expert]  # neighbours
            spans.append((first[mine[0]], first[mine[-1] + 1]) if mine else (0, 0))
        return experts, [[0, *last][e] for e in experts], spans

    branch, branch_starts, of_branch = of(branch_sizes)
    norm, norm_starts, of_norm = of(norm_sizes)
    sums = [(2, *span) for span in of_branch] + [(kind, *span) for kind in (0, 1) for span in of_norm]
    return _Plan(ends, branch, norm, branch_starts, norm_starts, programs, sums)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keep: Tensor | None,
        kept: bool,
        place: Tensor | None,
        mode: int,
        norm_sizes: tuple[int, ...],
        eps: float,
        of_y: torch.dtype,
        branches: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        require_narrow("x", x)
        if any(ctx.needs_input_grad) and any(dtype != x.dtype for dtype in (of_y, *(t.dtype for t in tensors))):
            raise ValueError("tokens, branches and norms of different types have no gradients")
        x = x.contiguous()
        (rows, width), norms = x.shape, len(norm_sizes)
        parts, added = [t.contiguous() for t in tensors[:branches]], tensors[branches : 2 * branches]
        weights, biases = tensors[2 * branches :][:norms], tensors[2 * branches :][norms:]
        sizes = tuple(len(part) for part in parts), norm_sizes
        shape = forward_shape(width)
        plan = _plan(rows, *sizes, backward_shape(width).programs(x.device))
        r = torch.empty_like(x) if branches else x
        y = torch.empty_like(x, dtype=of_y) if norms else x
        mean, scale = torch.empty(2, rows if norms else 0, dtype=torch.float32, device=x.device)
        if rows:
            launch(
                _forward_kernel, (rows,), x, *(parts[e] if branches else x for e in plan.branch),
                *(added[e] if branches else x for e in plan.branch), x if keep is None else keep,
                x if place is None else place, *(weights[e] if norms else x for e in plan.norm),
                *(biases[e] if norms else x for e in plan.norm), r, y, mean, scale, *plan.ends[:3],
                *plan.branch_starts[1:], eps,
                WIDTH=width, BLOCK=shape.block, BRANCH=branches > 0, KEEP=_keep(keep, kept), NORM=norms > 0,
                PLACE=mode, num_warps=shape.warps,
            )  # fmt: skip
        ctx.save_for_backward(r if norms else None, mean, scale, keep, place, *weights)
        ctx.plan, ctx.sizes, ctx.mode, ctx.kept = plan, sizes, mode, kept
        ctx.set_materialize_grads(False)
        return (x.view_as(x) if r is x else r), *(y.split(list(norm_sizes)) if norms else ())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_r: Tensor | None, *of_y: Tensor | None) -> tuple[Tensor | None, ...]:
        r, mean, scale, keep, place, *weights = ctx.saved_tensors
        plan: _Plan = ctx.plan
        branch_sizes, norm_sizes = ctx.sizes
        branches, norms = len(branch_sizes), len(norm_sizes)
        known = next(t for t in (of_r, *of_y) if t is not None)
        if of_r is None:  # nobody reads r but the norms; gathered, nobody ever does
            assert r is not None
            of_r = r if ctx.mode == GATHERED.value else torch.zeros_like(r)
        of_r = of_r.contiguous()
        rows, width = of_r.shape
        parts = [
            known.new_zeros(size, width) if part is None else part.contiguous()
            for part, size in zip(of_y, norm_sizes, strict=True)
        ]
        of_x = torch.empty_like(of_r) if norms else of_r
        differ = branches > 0 and (_keep(keep, ctx.kept) == 1 or ctx.mode == BRANCH_MOVED.value)
        of_branches = torch.empty_like(of_r) if differ else of_x
        shape = backward_shape(width)
        partial = torch.empty(plan.programs[-1], 3, width, dtype=torch.float32, device=of_r.device)
        if rows:
            launch(
                _backward_kernel, (plan.programs[-1],), of_r, *(parts[e] if norms else of_r for e in plan.norm),
                of_r if r is None else r, mean, scale, of_r if keep is None else keep,
                of_r if place is None else place, *(weights[e] if norms else of_r for e in plan.norm), of_x,
                of_branches, partial, *plan.ends, *plan.norm_starts[1:], *plan.programs,
                WIDTH=width, BLOCK=shape.block, BRANCH=branches > 0, KEEP=_keep(keep, ctx.kept), NORM=norms > 0,
                PLACE=ctx.mode, num_warps=shape.warps, maxnreg=shape.registers,
            )  # fmt: skip
        sums = sum_programs(partial, plan.sums, of_r.dtype)
        return of_x, *[None] * 8, *(of_branches.split(list(branch_sizes)) if branches else ()), *sums


def _keep(keep: Tensor | None, kept: bool) -> int:
    """KEEP of the kernels."""
    return 0 if keep is None else KEPT.value if kept else 1


def residual_norm(
    x_TD: Tensor, branch: Branch | None, keep_T: Tensor | None, norms: Norms | None
) -> tuple[Tensor, list[Tensor]]:
    """`plain_residual_norm`. For gradients all is of one type; either the branch or y may lie in another order."""
    branch, norms = branch or Branch([], []), norms or Norms([], [], [], 0.0)
    mode, place = 0, None
    for of, slices, elsewhere in ((BRANCH_MOVED, branch.slices, branch.place_T), (Y_MOVED, norms.sizes, norms.place_T)):
        if elsewhere is not None and (len(slices) > 1 or mode):
            raise ValueError("tokens in another order must belong to one expert, of the branch or of the norms")
        if elsewhere is not None:
            mode, place = of.value, elsewhere
    tensors = (*branch.slices, *branch.biases, *norms.weights, *norms.biases)
    of_norms = tuple(norms.sizes), norms.eps, norms.dtype or x_TD.dtype
    r_TD, *y = _ResidualNorm.apply(x_TD, keep_T, branch.kept, place, mode, *of_norms, len(branch.slices), *tensors)
    return r_TD, y


def gathered_norm(x_TD: Tensor, place_T: Tensor, norms: Norms) -> list[Tensor]:
    """The LayerNorms of x[place], for each expert [T_e, D]. place_T: int64 [T], a permutation; x is read by nobody
    else."""
    tensors, of_norms = (*norms.weights, *norms.biases), (tuple(norms.sizes), norms.eps, x_TD.dtype)
    return list(_ResidualNorm.apply(x_TD, None, False, place_T, GATHERED.value, *of_norms, 0, *tensors)[1:])
