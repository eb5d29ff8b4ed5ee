"""What the benchmarks measure with: clocks, memory, and the time of matrix products alone."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from beit3_dist.plan.allocations import Allocations


@dataclass(frozen=True)
class Seconds:
    """Medians and spread of one contender's turns."""

    wall: list[float]
    process: list[float]
    """Seconds of processors that this process used, all threads together; of use where others use the machine."""

    def record(self) -> dict[str, float]:
        return spread(self.wall) | {"cpu_s": median(self.process)}


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median_s": median(seconds), "fastest_s": min(seconds), "slowest_s": max(seconds)}


def gpu_or_cpu() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(actions: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[Seconds]:
    """Times the actions one after the other, `repeats` rounds after one that warms up."""
    taken = [Seconds([], []) for _ in actions]
    for repeat in range(repeats + 1):
        for action, seconds in zip(actions, taken, strict=True):
            synchronize(device)
            wall, process = time.perf_counter(), time.process_time()
            action()
            synchronize(device)
            if repeat:
                seconds.wall.append(time.perf_counter() - wall)
                seconds.process.append(time.process_time() - process)
    return taken


def check_positive(names: Sequence[str], options: Namespace) -> None:
    """Raises ValueError where one of these options is, or holds, a number less than 1."""
    for name in names:
        given = getattr(options, name)
        least = min(given) if isinstance(given, list) else given
        if least < 1:
            raise ValueError(f"--{name} {least} is less than 1")


# ----------------------------------------------------------------------------------------------------------- memory


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """Largest sum of what exists at once of the tensors that `action` makes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with Allocations() as allocations:
        action()
    return allocations.peak


def kept_bytes(action: Callable[[], Any], device: torch.device) -> int:
    """What still exists of the tensors that `action` makes while its results are held: a forward pass's graph."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        held = action()
        torch.cuda.synchronize(device)
        kept = torch.cuda.memory_allocated(device) - before
        return kept if any(t.requires_grad for t in tree_iter(held)) else 0
    with Allocations() as allocations:
        held = action()
        return allocations.now if any(t.requires_grad for t in tree_iter(held)) else 0


# -------------------------------------------------------------------------------------------------- matrix products

Product = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]], torch.dtype]
"""(shape, strides) of both factors, and their type."""


class MatrixProducts(TorchDispatchMode):
    """Records the matrix products of the operations that run while it is active. A fused attention counts as the two
    products of batches that it stands for, its backward pass as four."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Product] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._add(args[0], args[1])
        elif name in ("addmm", "baddbmm"):
            self._add(args[1], args[2])
        elif "scaled_dot_product" in name:
            q, k, v = args[1:4] if name.endswith("backward") else args[:3]
            for _ in range(2 if name.endswith("backward") else 1):
                self._add(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
                self._add(q.new_empty(q.shape[0] * q.shape[1], q.shape[2], k.shape[2]), v.flatten(0, 1))
        return operation(*args, **(kwargs or {}))

    def _add(self, left: Tensor, right: Tensor) -> None:
        if left.numel() and right.numel():
            describe = lambda t: (tuple(t.shape), t.stride())  # noqa: E731
            self.calls.append((describe(left), describe(right), left.dtype))

    def flops(self) -> int:
        return sum(2 * torch.Size(left[0]).numel() * right[0][-1] for left, right, _ in self.calls)

    def alone(self, device: torch.device) -> Callable[[], None]:
        """Takes them all again, in their order and with nothing between. Factors and results are there already, one
        for all products of a shape."""
        factor = cache(lambda *form, dtype: torch.empty_strided(*form, dtype=dtype, device=device).normal_())
        result = cache(lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=device))
        actions = []
        for left, right, dtype in self.calls:
            a, b = factor(*left, dtype=dtype), factor(*right, dtype=dtype)
            out = result(*a.shape[:-1], b.shape[-1], dtype=dtype)
            actions.append(partial(torch.bmm if a.ndim == 3 else torch.mm, a, b, out=out))

        def take() -> None:
            for action in actions:
                action()

        return take


# ---------------------------------------------------------------------------------------------------------- profile


def profile_table(action: Callable[[], Any], device: torch.device, rows: int = 25) -> str:
    """The operations of one call that take longest by themselves: time, share, calls."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        action()
        synchronize(device)
    by = f"self_{'device' if cuda else 'cpu'}_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=58)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, operations use so many threads; None: as many as torch likes."""
    usual = torch.get_num_threads()
    torch.set_num_threads(count or usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
