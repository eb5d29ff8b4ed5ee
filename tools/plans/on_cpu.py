"""What the planner is held against on a CPU: memory and time of real steps.

Memory is counted by allocation, since a CPU's allocator keeps no peak: all tensors that exist before a step, and those
that operations make in it, each storage once. Time is planned by the CPU's own rates (cpu_rates.py).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import BatchConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig, require
from beit3_dist.data.batch import MicroBatch
from beit3_dist.model.initialization import zeros
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.phases import Phases
from beit3_dist.plan.allocations import Allocations
from beit3_dist.plan.devices import Device
from beit3_dist.plan.layouts import Layout, Plan, Planner
from beit3_dist.tools.benchmarks.step import random_micro_batch

MODEL = ModelConfig(
    layers=6, width=384, heads=6, ffn_width=1536, patch_size=16, image_size=128, vocab_size=4010,
    visual_vocab_size=2048, vl_expert_layers=1, drop_path=0.1, max_text_length=126,
)  # fmt: skip
"""What is planned and measured."""
OTHER = replace(MODEL, layers=4, width=512, heads=8, ffn_width=2048, vl_expert_layers=1)
"""What the rates of cpu_rates.py come from."""
SAMPLES = 16
TEXTS, CAPTIONS = 96, 32
LAYOUTS = (  # the processes are two
    Layout(1, 1, False, 1, "none", 1),
    Layout(3, 1, False, 1, "full", 2),
    Layout(2, 1, False, 1, "attention", 2),
    Layout(1, 2, False, 1, "none", 2),
    Layout(3, 2, True, 1, "selective", 1),
    Layout(1, 1, False, 2, "none", 4),
)
"""Whose steps are timed."""
PROCESSES = 2


def run_config(
    model: ModelConfig, layout: Layout, precision: Any = "fp32", file: str = "", samples: int = SAMPLES
) -> RunConfig:
    """A run of masked data modelling whose codes are there already. `file`: its deepspeed_config."""
    zero_stage: Any = layout.zero_stage
    config = RunConfig(
        out="unused", text_tokenizer="unused", image_codes="unused", precision=precision, kernels="torch", model=model,
        data=DataConfig(
            images="unused", texts="unused", pairs="unused", text_length=TEXTS, caption_length=CAPTIONS
        ),
        objectives={NAME: MaskedDataModelingConfig()},
        batch=BatchConfig(images=samples, texts=samples, pairs=samples, accumulation=layout.accumulation),
        parallel=ParallelConfig(zero_stage=zero_stage), deepspeed_config=file,
    )  # fmt: skip
    return layout.of(config)


def micro_batch(config: RunConfig, data: int) -> MicroBatch:
    """Of a replica, with texts and captions as the planner takes them."""
    images, texts, pairs = config.micro_batch(data)
    lengths = config.data.text_length, (8, config.data.caption_length)
    return random_micro_batch(config.model, images, texts, pairs, *lengths)


class Steps:
    """One run's steps, in this process."""

    def __init__(self, groups: Any, config: RunConfig) -> None:
        from beit3_dist.parallel.engine import Engine
        from beit3_dist.parallel.pipeline import plan_stages
        from beit3_dist.train.optimizer import build_optimizer
        from beit3_dist.train.totals import host_totals

        self._mesh, self._objectives = groups.mesh, objectives_of(config)
        self.engine = Engine(
            config,
            groups,
            self._objectives.build,
            lambda name, shape: zeros(name, shape) + 0.01,
            plan=plan_stages(config, *self._objectives.largest(self._mesh.data)),
            objective=lambda model: PretrainingModule(model, self._objectives, config.seed),
            optimizer=lambda model, offload: build_optimizer(model, offload, config.optim),
        )
        self._batch = micro_batch(config, self._mesh.data)
        self._often = config.batch.accumulation
        self._counts = torch.tensor(host_totals([self._batch] * self._often, self._objectives).counts)
        groups.sum_over_data(self._counts)
        self._codes = lambda images: torch.zeros(len(images), config.model.patches, dtype=torch.int64)
        self._phases = Phases(self._mesh.device)
        self.engine.clocked_by(self._phases)
        self._done = 0

    def step(self) -> None:
        from beit3_dist.train.feed import prepared

        batches = (prepared(self._objectives, self._batch, self._mesh, self._codes) for _ in range(self._often))
        self.engine.train_step(batches, self._counts, self._done, 1e-3)
        self._done += 1

    def timed(self, repeats: int) -> list[Timed]:
        """Steps that begin in all processes at once, after two that warm up."""
        taken, yardstick = [], Yardstick()
        for number in range(repeats + 2):
            dist.barrier()
            self._phases.begin()
            start = time.perf_counter()
            self.step()
            whole_s = time.perf_counter() - start
            dist.barrier()
            yardstick_s = yardstick.seconds()
            if number > 1:
                taken.append(Timed(whole_s, sum(self._phases.seconds()[1:3]), yardstick_s))
        return taken


@dataclass(frozen=True)
class Timed:
    """Seconds of a step."""

    whole_s: float
    passes_s: float
    """Of these its forward and backward passes."""
    yardstick_s: float
    """What the yardstick took behind it."""


class Yardstick:
    """A transformer layer of torch's, forward and backward. A virtual machine's speed changes within minutes by a
    fourth and more, as its neighbours come and go; by this the speed while rates are measured and that while they are
    held against steps are compared."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            self._layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
            self._tokens = torch.randn(4, 128, 512)

    def seconds(self) -> float:
        start = time.perf_counter()
        self._layer(self._tokens).sum().backward()
        return time.perf_counter() - start


def peak_bytes(groups: Any, configs: list[RunConfig]) -> list[int]:
    """The most that exists in the third step of each run, in this process."""
    found = []
    for config in configs:
        gc.collect()
        allocations = Allocations()
        allocations.ignore(_tensors())  # former runs leave some
        steps = Steps(groups, config)
        steps.step()
        steps.step()
        gc.collect()
        allocations.follow(_tensors())
        with allocations:
            steps.step()
        found.append(allocations.peak)
        del steps
        gc.collect()
    return found


def _tensors() -> Iterator[Tensor]:
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            yield thing


def timed_steps(groups: Any, configs: list[RunConfig], repeats: int) -> list[list[Timed]]:
    """Steps of each run."""
    found = []
    for config in configs:
        found.append(Steps(groups, config).timed(repeats))
        gc.collect()
    return found


# ------------------------------------------------------------------------------------------------------- processes


def together(function: Callable[..., Any], *arguments: Any, tensor: int = 1, pipeline: int = 1) -> list[Any]:
    """`function(groups, *arguments)` in PROCESSES connected processes of one thread; their results by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=_work, args=(rank, port, tensor, pipeline, results, function, arguments))
        for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=1800) for _ in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [found[rank] for rank in range(PROCESSES)]


def _work(
    rank: int, port: int, tensor: int, pipeline: int, results: Any, function: Callable[..., Any], arguments: Any
) -> None:
    world = str(PROCESSES)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, LOCAL_SIZE=world,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    from beit3_dist.parallel.mesh import connect, read_mesh

    results.put((rank, function(connect(read_mesh(tensor, pipeline)), *arguments)))
    time.sleep(600)  # until it is ended: gloo's threads make an orderly end slow


def planned(
    device: Device, layout: Layout, model: ModelConfig = MODEL, precision: Any = "fp32", file: str = "",
    samples: int = SAMPLES,
) -> Plan:  # fmt: skip
    """What the planner says of one of these runs."""
    plan = Planner(run_config(model, layout, precision, file, samples), device, exact=True).plan(layout, PROCESSES)
    assert isinstance(plan, Plan)
    return plan


def compared(device: Device, repeats: int) -> Iterator[str]:
    """Steps of LAYOUTS as they are planned and as they are, for people. What is planned is multiplied by how much more
    the yardstick takes now than when the rates were measured, which is told. Raises ValueError where the rates have no
    yardstick."""
    require(device.yardstick_s > 0, "--rates have no yardstick: measure them anew by --calibrate")
    yield f"{'layout':62}{'s/step':>9}{'fastest':>9}{'yardstick':>11}{'planned':>9}{'off by':>8}"
    for tensor, pipeline in dict.fromkeys((layout.tensor, layout.pipeline) for layout in LAYOUTS):
        own = [layout for layout in LAYOUTS if (layout.tensor, layout.pipeline) == (tensor, pipeline)]
        configs = [run_config(MODEL, layout) for layout in own]
        measured = together(timed_steps, configs, repeats, tensor=tensor, pipeline=pipeline)[0]
        for layout, steps in zip(own, measured, strict=True):
            taken_s = median(t.whole_s for t in steps)
            slower = median(t.yardstick_s for t in steps) / device.yardstick_s
            planned_s = planned(device, layout).time.total * slower
            name = " ".join(f"{key.split('.')[-1]}={value}" for key, value in layout.overrides().items())
            yield (
                f"{name.replace('activation_checkpointing', 'recompute'):62}{taken_s:9.3f}"
                f"{min(t.whole_s for t in steps):9.3f}{slower:10.2f}x{planned_s:9.3f}{planned_s / taken_s - 1:+8.1%}"
            )
