"""The layout of a run that leaves it open: `parallel.*` and `batch.accumulation` may be auto.

Of the layouts that divide, those with the fewest tensor and pipeline ranks come first, since each costs communication;
of the first that fit, the fastest by the planner is taken. One process finds it, by its own device, and the others are
told.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch

from beit3_dist.config import RunConfig, is_auto, require
from beit3_dist.launched import read_place
from beit3_dist.looking import of_run
from beit3_dist.parallel.deepspeed_config import read_deepspeed_file
from beit3_dist.plan.devices import DEVICES, USABLE, Device, Link
from beit3_dist.plan.dividing import RANKS, accumulations
from beit3_dist.plan.layouts import Layout, Plan, Planner

log = logging.getLogger(__name__)

CPU = Device(
    "cpu", 0, 0, 2e10, Link(1e9, 1e-4), Link(1e8, 1e-3), "orders of magnitude", gpu=False, memory_share=1.0,
    launch_s=1e-5, core_rate=2e10, products=[(1.0, 5e10)], link_share=1.0,
)  # fmt: skip
"""Good enough to tell layouts apart."""


def with_layout(config: RunConfig, world: int) -> RunConfig:
    """The run with numbers in the place of auto, for `world` processes. Raises ValueError where no layout divides and
    fits, and where the run has what the planner does not count."""
    open_fields = [name for name, value in _fields(config).items() if is_auto(value)]
    if not open_fields:
        return config
    found = of_run(lambda: _found(config, world, open_fields[0]))
    layout = Layout(**found["layout"])
    parallel = replace(
        config.parallel, tensor=layout.tensor, pipeline=layout.pipeline, zero_stage=layout.zero_stage,
        sequence=layout.sequence,
    )  # fmt: skip
    run = replace(config, parallel=parallel, batch=replace(config.batch, accumulation=layout.accumulation))
    log.info(
        "auto: %s; planned: %.1f of %.1f GB on the fullest device",
        ", ".join(f"{name}={_fields(run)[name]}" for name in open_fields), found["memory_gb"], found["usable_gb"],
    )  # fmt: skip
    return run


def _found(config: RunConfig, world: int, field: str) -> dict[str, Any]:
    """The layout, and what it takes. `field`: the first that is open."""
    modes, chunks = config.activation_checkpointing, config.parallel.chunks
    require(
        isinstance(modes, str),
        f"activation_checkpointing lists modes of pipeline ranks, but {field}=auto: give one mode for all",
    )
    require(
        chunks == 1,
        f"parallel.chunks={chunks}: the planner knows no interleaved stages, but {field}=auto: use parallel.chunks=1, "
        "or give a number",
    )
    device = this_device(world)
    planner = Planner(replace(config, batch=replace(config.batch, accumulation=1)), device)
    require(
        not planner.uncounted,
        f"{', '.join(planner.uncounted)}: the planner does not count teachers, but {field}=auto: give a number",
    )
    usable, least, reason = device.memory_gb * USABLE, float("inf"), ""
    for ranks in sorted(product(_choices(config, "parallel.tensor"), _choices(config, "parallel.pipeline")), key=_cost):
        found: list[Plan] = []
        for layout in _layouts(config, *ranks):
            try:
                plan = planner.plan(layout, world, usable)
            except ValueError as error:
                reason = str(error)
                continue
            if isinstance(plan, float):
                least = min(least, plan)
            else:
                found.append(plan)
        if found:
            best = min(found, key=lambda plan: plan.time.total)
            return {"layout": asdict(best.layout), "memory_gb": best.memory_gb, "usable_gb": usable}
    require(least < float("inf"), f"{field}=auto: no layout of {world} processes divides: {reason}")
    raise ValueError(
        f"{field}=auto: no layout of {world} processes fits {usable:.1f} GB a process, the least takes "
        f"{least:.1f}: use more devices, or activation_checkpointing=full"
    )


def _fields(config: RunConfig) -> dict[str, int]:
    names = ("tensor", "pipeline", "zero_stage")
    return {f"parallel.{name}": getattr(config.parallel, name) for name in names} | {
        "batch.accumulation": config.batch.accumulation
    }


def _cost(ranks: tuple[int, int]) -> tuple[int, int]:
    return ranks[0] * ranks[1], ranks[1]


def _choices(config: RunConfig, field: str) -> tuple[int, ...]:
    value = _fields(config)[field]
    if not is_auto(value):
        return (value,)
    if field == "parallel.zero_stage":
        of_file = read_deepspeed_file(config.deepspeed_config).get("zero_optimization", {}).get("stage", "auto")
        return (of_file,) if of_file != "auto" else (1, 2, 3)
    if field == "batch.accumulation":
        return tuple(accumulations(config))
    return RANKS


def _layouts(config: RunConfig, tensor: int, pipeline: int) -> Iterator[Layout]:
    """The layouts of so many tensor and pipeline ranks."""
    modes, sequence = config.activation_checkpointing, config.parallel.sequence and tensor > 1
    assert isinstance(modes, str)
    stages, accumulations = _choices(config, "parallel.zero_stage"), _choices(config, "batch.accumulation")
    for zero_stage, accumulation in product(stages, accumulations):
        yield Layout(zero_stage, tensor, sequence, pipeline, modes, accumulation)


def this_device(world: int) -> Device:
    """This process's: one of the table, or an H100 of another size; of a CPU this process's part of its memory."""
    if not torch.cuda.is_available():
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 / read_place().local_world
        return replace(CPU, memory_gb=float(int(size)), node=world)
    properties = torch.cuda.get_device_properties(0)
    size = properties.total_memory / 1e9
    named = [device for device in DEVICES.values() if device.name.split("-")[0] in properties.name]
    near = min(named or [DEVICES["H100"]], key=lambda device: abs(device.memory_gb - size))
    return near if named else replace(near, name=properties.name, memory_gb=float(int(size)))
