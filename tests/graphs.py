"""A stand-in for CUDA's graphs, which need a GPU: it records operations instead of kernels, and repeats them at the
same addresses with the same numbers, as CUDA does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from beit3_dist.kernels.registry import operations
from beit3_dist.kernels.varlen_attention.definition import plain_varlen_attention
from beit3_dist.model import BEiT3
from beit3_dist.model.block import Block
from beit3_dist.parallel.fused import FusedForward, add

DEFINITIONS = {name: operation.definition for name, operation in operations().items()}


class Operations(TorchDispatchMode):
    """Records operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def repeat(self) -> None:
        """Computes all anew of what lies there now."""
        for function, args, kwargs, results in self.calls:
            if getattr(function, "is_view", False):
                continue
            again = function(*args, **kwargs)
            for mine, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(mine, Tensor) and mine.data_ptr() != new.data_ptr():
                    mine.detach().copy_(new)

    def spoil(self, weights: set[int]) -> None:
        """Leaves nothing of what was computed, as CUDA computes nothing while it records."""
        for *_, results in self.calls:
            for made in tree_leaves(results):
                if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in weights:
                    made.detach().fill_(float("nan") if made.is_floating_point() else 0)


class StandIn:
    """In place of `CudaRecorder`, for blocks of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.recordings = 0

    @contextmanager
    def recording(self) -> Iterator[Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]]:
        self.recordings += 1
        recorded: list[Operations] = []

        def record(compute: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            recorded.append(Operations())
            with recorded[-1]:
                result = compute()
            return result, recorded[-1].repeat

        yield record
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}
        for of_block in recorded:
            of_block.spoil(weights)

    def free(self) -> None:
        """Nothing else holds it."""


def as_one(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Computes it as one operation in the eyes of who records."""
    mode = _get_current_dispatch_mode()
    if not isinstance(mode, Operations):
        return function(*inputs)
    with _disable_current_modes():
        result = function(*inputs)
    mode.calls.append((function, inputs, {}, result))
    return result


def core_gradient(gradient: Tensor, qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        return torch.autograd.grad(plain_varlen_attention(leaf, cumulative, longest), leaf, gradient)[0]


class Core(torch.autograd.Function):
    """Attention's core as one operation, which reads where samples begin whenever it is repeated."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cumulative: Tensor, longest: int) -> Tensor:
        assert int(cumulative.diff().max()) <= longest
        ctx.save_for_backward(qkv, cumulative)
        ctx.longest = longest
        return as_one(plain_varlen_attention, qkv, cumulative, longest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return as_one(core_gradient, gradient, *ctx.saved_tensors, ctx.longest), None, None


def fuse(model: BEiT3) -> None:
    """Blocks as on a GPU, each operation by its definition."""
    for block in model.blocks.values():
        assert isinstance(block, Block)
        block.forward = FusedForward(block, DEFINITIONS, Core.apply)  # type: ignore[method-assign, assignment]
    model.blocks.leave = lambda x, layout: add(x, DEFINITIONS["residual_norm"])
