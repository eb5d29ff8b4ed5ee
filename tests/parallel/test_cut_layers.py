"""Layers that are cut over tensor ranks compute what whole ones do, and keep no more for the backward pass."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from beit3_dist.kernels.gelu_layer_norm import GeluLayerNorm
from beit3_dist.model.cut import Cut
from beit3_dist.model.head import Head
from beit3_dist.parallel import tensor
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.tensor import ShardedLayerNorm, VocabParallelHead
from beit3_dist.plan.allocations import Allocations
from tests.parallel.workers import run_workers

ROWS, WIDTH, CLASSES = 33, 16, 149
"""The last of the two ranks has a row of padding."""
SURE = 15.0
"""A logit whose class is nearly certain: all others together have a share of 5e-5."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_values(module: Any, dtype: torch.dtype, cut: Cut | None = None) -> Any:
    """Weights and biases of a whole layer, or the part of them that `cut` says."""
    values = {"weight": normal(*whole_shape(module), seed=1), "bias": normal(whole_shape(module)[0], seed=2)}
    for name, value in values.items():
        setattr(module, name, nn.Parameter((value if cut is None else cut.of(value)).to(dtype)))
    return module


def whole_shape(module: Any) -> tuple[int, ...]:
    return (CLASSES, WIDTH) if isinstance(module, Head) else (2 * WIDTH,)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def heads(groups: Groups, dtype: torch.dtype, chunk: int) -> dict[str, float]:
    """How far the cut head is from the whole one in fp64, and the most bytes of its passes beside one matrix of
    logits."""
    cut, hidden_MD = Cut(0, groups.mesh.tensor_rank, 2), normal(ROWS, WIDTH).to(dtype)
    targets = torch.arange(ROWS) * 7 % CLASSES
    whole = with_values(Head(WIDTH, CLASSES), torch.float64)
    own = with_values(VocabParallelHead(Head(WIDTH, CLASSES), groups.tensor), dtype, cut)
    with torch.no_grad():  # as rounded as the cut one's
        whole.weight.copy_(whole.weight.to(dtype))
        whole.bias.copy_(whole.bias.to(dtype))
    logits = whole.logits(hidden_MD.double()).detach()
    targets[::4] = logits[::4].argmax(1)
    found = {}
    inputs = [hidden_MD.double().requires_grad_(), hidden_MD.clone().requires_grad_()]
    factors = normal(ROWS, seed=3)
    theirs = whole(inputs[0], targets)
    (theirs[0] * factors).sum().backward()
    with patch.object(tensor, "CHUNK", chunk), Allocations() as allocations:
        ours = own(inputs[1], targets)
        (ours[0] * factors).sum().backward()
    assert torch.equal(ours[1].double(), theirs[1].double()) and 0 < ours[1].sum() < ROWS
    found["losses"] = distance(ours[0].detach(), theirs[0].detach())
    found["hidden"] = distance(inputs[1].grad, inputs[0].grad)
    found["weight"] = distance(own.weight.grad, cut.of(whole.weight.grad))
    found["bytes"] = allocations.peak / (ROWS * -(-CLASSES // 2) * dtype.itemsize)
    with pytest.raises(RuntimeError, match="gone backward before"):
        ours = own(inputs[1], targets)
        ours.sum().backward(retain_graph=True)
        ours.sum().backward()
    return found


def certain(groups: Groups) -> float:
    """The gradient of a nearly certain target's logit in bf16, in fp64's."""
    head = VocabParallelHead(Head(WIDTH, CLASSES), groups.tensor)
    width = -(-CLASSES // 2)
    logits = torch.zeros(1, width, dtype=torch.bfloat16, requires_grad=True)
    head.compute = lambda x, weight, bias: (
        logits + SURE * (torch.arange(width) == 3) * (groups.tensor.rank() == 0)
    ).to(torch.bfloat16)
    head(torch.zeros(1, WIDTH), torch.tensor([3]))[0].sum().backward()
    others = (CLASSES - 1) / (CLASSES - 1 + torch.tensor(SURE).double().exp().item())
    return float(logits.grad[0, 3]) / -others


def norms(groups: Groups, dtype: torch.dtype) -> dict[str, Any]:
    """How far the cut norm behind GELU is from the whole one in fp64, and how many elements it keeps."""
    cut, x_TF, gradient = Cut(0, groups.mesh.tensor_rank, 2), normal(ROWS, 2 * WIDTH).to(dtype), normal(ROWS, 2 * WIDTH)
    whole = with_values(GeluLayerNorm(2 * WIDTH, 1e-5), torch.float64)
    own = with_values(ShardedLayerNorm(GeluLayerNorm(2 * WIDTH, 1e-5), groups.tensor), dtype, cut)
    columns = Cut(1, groups.mesh.tensor_rank, 2)
    inputs = [x_TF.double().requires_grad_(), columns.of(x_TF).requires_grad_()]
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        ours = own(inputs[1])
    theirs = whole(inputs[0])
    theirs.backward(gradient.double())
    ours.backward(columns.of(gradient).to(dtype))
    return {
        "values": distance(ours.detach(), columns.of(theirs.detach())),
        "input": distance(inputs[1].grad, columns.of(inputs[0].grad)),
        "weight": distance(own.weight.grad, cut.of(whole.weight.grad)),
        "bias": distance(own.bias.grad, cut.of(whole.bias.grad)),
        "kept": sorted(kept),
    }


def everything(groups: Groups) -> dict[str, Any]:
    """For `run_workers`."""
    types = torch.float32, torch.bfloat16
    chunks = 1 << 24, 3 * CLASSES
    return {
        "heads": [heads(groups, dtype, chunk) for dtype in types for chunk in chunks],
        "certain": certain(groups),
        "norms": [norms(groups, dtype) for dtype in types],
    }


def test_cut_heads_and_norms() -> None:
    for rank, found in enumerate(run_workers(2, everything, tensor=2)):
        wide, wide_in_chunks, narrow, narrow_in_chunks = found["heads"]
        for one in (wide, wide_in_chunks):
            assert max(one["losses"], one["hidden"], one["weight"]) < 1e-5
        for one in (narrow, narrow_in_chunks):
            assert one["losses"] < 1e-2 and max(one["hidden"], one["weight"]) < 2e-2
        # One matrix of logits, which are their gradient later, and what is as small as the hidden states.
        assert max(one["bytes"] for one in (wide, wide_in_chunks, narrow_in_chunks)) < 2, found["heads"]
        assert rank == 1 or abs(found["certain"] - 1) < 0.02
        for own, tolerance in zip(found["norms"], (1e-5, 2e-2), strict=True):
            assert max(own[name] for name in ("values", "input", "weight", "bias")) < tolerance
            assert own["kept"] == [WIDTH, ROWS, ROWS, ROWS * WIDTH], "more than its input, its weight and two moments"
