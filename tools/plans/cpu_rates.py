"""A CPU's own rates, for the planner: of single operations in one step of another model than those that are planned, of
collectives, and of what the host takes beside them, with as many processes at work as later.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.plan.counting import Counting
from beit3_dist.plan.devices import Device, Link
from beit3_dist.plan.layouts import Layout
from beit3_dist.plan.traffic import FREE, PRODUCT, Traffic
from beit3_dist.tools.plans.on_cpu import OTHER, PROCESSES, Steps, planned, run_config

SMALL = replace(OTHER, width=64, heads=2, ffn_width=128)
"""Whose steps of few samples compute next to nothing: what they take is the host's."""
OF_LAUNCHES, OF_FETCHES = Layout(1, 1, False, 1, "none", 1), Layout(3, 1, False, 1, "full", 1)
"""Layouts from which what the host takes for a launch and for one of ZeRO-3's fetches comes."""
FEW = 2
"""Its samples of each stream in a step."""
OFTEN = 15
"""Steps that a rate comes from."""
SIZES = (2_000, 100_000_000)
"""Bytes of the collectives that latency and bandwidth come from."""


class _Clocked(Traffic):
    """Seconds of every operation on the CPU beside what it is counted to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.products_s: dict[float, list[float]] = defaultdict(list)
        """FLOP of one product -> seconds of each."""
        self.core_s = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        start = time.perf_counter()
        result = function(*args, **kwargs)
        taken = time.perf_counter() - start
        if function.is_view or name in FREE:
            return result
        if "scaled_dot_product" in name:
            self.core_s += taken
            return result
        results = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        before = self.products.copy()
        self._count(function, name, args, kwargs, results)
        if name in PRODUCT:
            for (b, m, k, n), often in (self.products - before).items():
                self.products_s[2.0 * m * k * n] += [taken / b / often] * often
        else:
            self.seconds[name.strip("_")] += taken
        return result


def rates(groups: Any) -> dict[str, Any]:
    """The CPU's rates, as plan/devices.py has them, from this process's steps and collectives.

    What the host takes beside operations and collectives, for each launch and for each of ZeRO-3's fetches, is what a
    small model's step takes beyond its plan. Operations and collectives, measured one by one, are then made slower or
    faster by a factor each, so that what a step of OTHER takes for its passes and for the rest is what is planned.
    """
    config = run_config(OTHER, OF_LAUNCHES)
    steps = Steps(groups, config)
    plain = steps.timed(OFTEN)
    clocked = _Clocked()
    with clocked:
        steps.step()
        steps.step()
    del steps
    operations = {
        name: clocked.rows[name].bytes / seconds
        for name, seconds in clocked.seconds.items()
        if name in clocked.rows and clocked.rows[name].bytes and seconds
    }
    work = Counting(config, gpu=False).pieces(config.micro_batch(groups.mesh.data), "none")
    core = work.around.work.core_flops + work.layers * work.layer.work.core_flops
    moved = sum(clocked.rows[name].bytes for name in operations)
    products = sorted((size, size / median(taken)) for size, taken in clocked.products_s.items() if size > 1e5)
    collectives = _collectives()
    link = collectives["all_reduce"]
    device = Device(
        "cpu", _memory_gb(), peak=0.0, inside=link, outside=link, gpu=False, node=PROCESSES,
        bandwidth=moved / sum(clocked.seconds[name] for name in operations), memory_share=1.0, link_share=1.0,
        alone=_alone(), launch_s=0.0, collectives=collectives, core_rate=core * 2 / clocked.core_s,
        products=products, operations=operations, yardstick_s=median(t.yardstick_s for t in plain),
        source=f"tools/plan.py --calibrate, {torch.get_num_threads()} thread a process, torch {torch.__version__}",
    )  # fmt: skip
    for name, layout in (("launch_s", OF_LAUNCHES), ("fetch_s", OF_FETCHES)):
        taken_s = median(t.whole_s for t in Steps(groups, run_config(SMALL, layout, samples=FEW)).timed(OFTEN))
        none, second = (
            planned(replace(device, **{name: seconds}), layout, SMALL, samples=FEW).time.total for seconds in (0.0, 1.0)
        )
        device = replace(device, **{name: max(0.0, taken_s - none) / (second - none)})
    passes_s, rest_s = median(t.passes_s for t in plain), median(t.whole_s - t.passes_s for t in plain)
    as_it_is, of_host = (planned(faster(device, factor), OF_LAUNCHES, OTHER).time for factor in (1, math.inf))
    device = faster(device, (as_it_is.passes - of_host.passes) / (passes_s - of_host.passes))
    in_plan = planned(device, OF_LAUNCHES, OTHER).time
    return asdict(linked(device, in_plan.reduction / (rest_s - in_plan.optimizer)))


def faster(device: Device, factor: float) -> Device:
    """The same with other rates of operations."""
    return replace(
        device,
        bandwidth=device.bandwidth * factor,
        core_rate=device.core_rate * factor,
        products=[(size, rate * factor) for size, rate in device.products],
        operations={name: rate * factor for name, rate in device.operations.items()},
    )


def linked(device: Device, factor: float) -> Device:
    """The same with other bandwidths of collectives."""
    own = device.collectives.items()
    return replace(device, collectives={name: Link(link.bandwidth * factor, link.latency) for name, link in own})


def _alone() -> float:
    """How much faster a process multiplies while the others wait."""
    factor = torch.ones(1024, 1024)

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(40):
            factor @ factor
        return time.perf_counter() - start

    seconds()
    dist.barrier()
    together_s = seconds()
    alone_s = 0.0
    for rank in range(dist.get_world_size()):
        dist.barrier()
        if rank == dist.get_rank():
            alone_s = seconds()
    dist.barrier()
    return max(1.0, together_s / alone_s)


def _collectives() -> dict[str, Link]:
    """What connects the processes in collectives of few and of many bytes."""
    world, rank, found = dist.get_world_size(), dist.get_rank(), {}
    for name, rounds in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)):
        seconds = []
        for size in SIZES:
            whole = torch.zeros(size // 4)
            own = whole.chunk(world)[rank].clone()
            call: Callable[[], Any] = {
                "all_reduce": partial(dist.all_reduce, whole),
                "all_gather": partial(dist.all_gather_into_tensor, whole, own),
                "reduce_scatter": partial(dist.reduce_scatter_tensor, own, whole),
            }[name]
            call()
            taken = []
            for _ in range(9):
                dist.barrier()
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            seconds.append(median(taken))
        bandwidth = rounds * (world - 1) / world * (SIZES[1] - SIZES[0]) / max(1e-9, seconds[1] - seconds[0])
        found[name] = Link(bandwidth, seconds[0] / rounds)
    return found


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 / PROCESSES
