"""Collectives over the tensor ranks with their gradients; forward and backward are transposes of one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tensors one after the other along the first dimension; without a gradient."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def all_agree(done: bool, device: torch.device) -> bool:
    """Whether it is so on all ranks of the run."""
    flag = torch.tensor(int(done), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def made_in_shares(make: Callable[[Tensor], Tensor], count: int, group: dist.ProcessGroup | None) -> Tensor:
    """What `make` gives of rows 0 to count - 1, int64 on the host, without a gradient. Where the processes of `group`
    would all make the same, each makes its share of it; collective then."""
    rows = torch.arange(count)
    if group is None or group.size() == 1 or not count:
        return make(rows)
    share = -(-count // group.size())
    # The last shares are filled up with the first rows, so that all are of one size.
    return all_gather(make((rows[:share] + group.rank() * share) % count), group)[:count]


def _same(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def _own_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size())[group.rank()].clone()


def _divide(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x / group.size()


Collective = Callable[..., Tensor]
"""(tensor, group) -> tensor."""


def _with_gradient(there: Collective, back: Collective) -> Collective:
    """`there`, whose gradient comes `back`."""

    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
            ctx.group = group
            return there(x, group)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return back(gradient, ctx.group), None

    return lambda x, group: Pair.apply(x, group)


copy = _with_gradient(_same, _all_reduce)
"""Replicated -> replicated, whose gradients are partial sums: identity; backward all-reduce."""
reduce = _with_gradient(_all_reduce, _same)
"""Partial sums -> their sum on every rank: all-reduce; backward identity."""
gather = _with_gradient(all_gather, _reduce_scatter)
"""Each rank's rows -> all rows, rank by rank, whose gradients are partial sums; backward reduce-scatter."""
reduce_scatter = _with_gradient(_reduce_scatter, all_gather)
"""Partial sums of all rows -> each rank's rows of their sum; backward all-gather."""
scatter = _with_gradient(_own_rows, all_gather)
"""Replicated rows -> each rank's own rows; backward all-gather."""
gather_replicated = _with_gradient(all_gather, _own_rows)
"""Each rank's rows -> all rows, whose gradients are whole on every rank; backward takes the rank's rows."""
divide = _with_gradient(_divide, _same)
"""x / ranks, so that the ranks' quotients add up to x; each rank's gradient is x's whole one."""
