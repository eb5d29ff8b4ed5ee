"""Where a block's residual connection parts into the experts' slices and where they come back."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_dist.model.multiway import fork, merge

SIZES = {"one expert": [7], "three": [2, 4, 1], "one without tokens": [3, 0, 4]}


def branch(x_TD: Tensor, keep_T: Tensor | None, sizes: list[int]) -> Tensor:
    """A residual connection around one expert each, which multiplies by its number."""
    x_TD, slices = fork(x_TD, sizes)
    return merge(x_TD, [part * (n + 2) for n, part in enumerate(slices)], keep_T)


def plain_branch(x_TD: Tensor, keep_T: Tensor | None, sizes: list[int]) -> Tensor:
    """The definition."""
    joined = torch.cat([part * (n + 2) for n, part in enumerate(x_TD.split(sizes))])
    return x_TD + (joined if keep_T is None else joined * keep_T[:, None])


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_the_definitions(sizes: list[int], dropped: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, dtype=torch.float64, generator=draw, requires_grad=True)
    keep = torch.tensor([0.0, 1.25] * 4, dtype=torch.float64)[:7] if dropped else None
    close = partial(torch.testing.assert_close, rtol=1e-14, atol=1e-14)  # fp64; addcmul rounds once, * and + twice
    close(branch(x, keep, sizes), plain_branch(x, keep, sizes))
    of_y = torch.randn(7, 5, dtype=torch.float64, generator=draw)
    ours, theirs = (torch.autograd.grad(f(x, keep, sizes), x, of_y)[0] for f in (branch, plain_branch))
    close(ours, theirs)
    assert torch.autograd.gradcheck(lambda x: branch(x, keep, sizes), x)


def test_nothing_is_joined() -> None:
    class Joins(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += operation.overloadpacket.__name__ == "cat"
            return operation(*args, **(kwargs or {}))

    x = torch.randn(7, 5, requires_grad=True)
    with Joins() as ours:
        branch(x, torch.ones(7), [2, 4, 1]).sum().backward()
    with Joins() as theirs:
        plain_branch(x, torch.ones(7), [2, 4, 1]).sum().backward()
    assert (ours.count, theirs.count) == (0, 2)


def test_an_expert_that_nobody_reads_has_no_gradient() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    whole, slices = fork(x, [1, 2])
    (whole.sum() + slices[0].sum()).backward()
    assert x.grad is not None and x.grad.tolist() == [[2, 2], [1, 1], [1, 1]]
