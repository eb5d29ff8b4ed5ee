"""Every layout of a run on so many devices: memory of the fullest one, and the time of a step.

**Memory.** States, gradients, buckets and live parameters are those of parallel/memory.py, what exists of activations
that of plan/counting.py. A rank of a pipeline holds the activations of as many micro-batches as are on their way behind
it, min(p - r, accumulation), with what came and goes (a buffer for each direction and micro-batch on its way); the
first rank has all inputs of a step. The peak is the larger of two moments: the first block's backward pass, when all
activations and no gradient of this pass are there, and the last one's, when it is the other way round; between them
both change block by block.

**Time.** Work by the device's rates (plan/devices.py); collectives of tensor ranks are waited for, those over replicas
run beside two thirds of a micro-batch's passes, its backward pass, and what is longer is waited for. A pipeline idles
for (p - 1) of the slowest stage's micro-batches. The image tokenizer runs on the last stage, shared out among its
tensor ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import gcd
from typing import Any

from beit3_dist.config import STREAMS, Recompute, RunConfig, require
from beit3_dist.objectives.base import Objective
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.parallel.deepspeed_config import read_deepspeed_file
from beit3_dist.parallel.memory import StateBytes, state_bytes
from beit3_dist.parallel.pipeline import StagePlan, plan_stages
from beit3_dist.plan.counting import Counting, Pieces, Work
from beit3_dist.plan.devices import USABLE, Device

RECOMPUTES: tuple[Recompute, ...] = ("none", "attention", "selective", "full")
COUNTED = (2, 16)
"""Micro-batches, in smallest possible ones, that are counted; others lie on the line through both."""
BESIDE = 2 / 3
"""Share of a micro-batch's passes beside which gradients are reduced: the backward pass is twice the forward pass."""
FETCHES: dict[Recompute, int] = {"none": 2, "attention": 2, "selective": 3, "full": 3}
"""How often a micro-batch's passes ask for a module's weights under ZeRO-3: forward, backward, and to compute anew."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    zero_stage: int
    tensor: int
    sequence: bool
    pipeline: int
    activation_checkpointing: Recompute
    accumulation: int

    def overrides(self) -> dict[str, str]:
        """What pretrain.py takes."""
        values = {
            "parallel.zero_stage": self.zero_stage,
            "parallel.tensor": self.tensor,
            "parallel.sequence": str(self.sequence).lower(),
            "parallel.pipeline": self.pipeline,
            "activation_checkpointing": self.activation_checkpointing,
            "batch.accumulation": self.accumulation,
        }
        return {name: str(value) for name, value in values.items()}

    def of(self, config: RunConfig) -> RunConfig:
        """The run under this layout. A DeepSpeed file of another stage is left out."""
        zero_stage: Any = self.zero_stage
        stays = zero_stage == config.parallel.zero_stage
        return replace(
            config,
            parallel=replace(
                config.parallel, zero_stage=zero_stage, tensor=self.tensor, sequence=self.sequence,
                pipeline=self.pipeline, chunks=1,
            ),
            activation_checkpointing=self.activation_checkpointing,
            activation_checkpointing_every=(
                1 if self.activation_checkpointing == "none" else config.activation_checkpointing_every
            ),
            batch=replace(config.batch, accumulation=self.accumulation),
            deepspeed_config=config.deepspeed_config if stays else "",
        )  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment of the peak."""

    parameters: float = 0
    gradients: float = 0
    states: float = 0
    """Masters and moments."""
    buckets: float = 0
    live: float = 0
    """Gathered parameters of ZeRO-3."""
    activations: float = 0
    """Of all micro-batches on their way, with what their passes need for a moment."""
    pipeline_buffers: float = 0
    average: float = 0
    """Moving averages of the weights."""
    image_tokenizer: float = 0

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Time:
    """Seconds of a step."""

    passes: float
    """Forward and backward of all micro-batches of the slowest stage, with the tensor ranks' collectives."""
    tensor: float
    """Of these, the collectives."""
    targets: float
    """Image targets, where they make the last stage the slowest."""
    bubble: float
    """Idle time of a pipeline, and sending between its stages."""
    reduction: float
    """Collectives over the replicas that nothing hides."""
    optimizer: float

    @property
    def total(self) -> float:
        return self.passes + self.targets + self.bubble + self.reduction + self.optimizer


@dataclass(frozen=True)
class Plan:
    """A layout with what it takes."""

    layout: Layout
    data: int
    """Replicas."""
    micro_batch: tuple[int, ...]
    """Samples of each of STREAMS."""
    memory: Memory
    host_gb: float
    """Of a checkpoint's snapshot, per device."""
    time: Time
    tokens: int
    """Of a step."""

    @property
    def memory_gb(self) -> float:
        return self.memory.total / 1e9

    def record(self) -> dict[str, Any]:
        """For --json."""
        step_s = self.time.total
        micro_batch = dict(zip(STREAMS, self.micro_batch, strict=True))
        return asdict(self.layout) | {
            "data": self.data,
            "micro_batch": micro_batch,
            "memory_gb": self.memory_gb,
            "memory": {name: size / 1e9 for name, size in vars(self.memory).items()},
            "host_gb": self.host_gb,
            "step_s": step_s,
            "time": vars(self.time),
            "tokens_per_s": self.tokens / step_s,
        }


class Planner:
    """Plans one recipe on one kind of device."""

    def __init__(self, config: RunConfig, device: Device, exact: bool = False) -> None:
        """`exact`: every size of a micro-batch is counted by itself. Raises ValueError where the recipe's DeepSpeed
        file is wrong or the kernels cannot be counted."""
        read_deepspeed_file(config.deepspeed_config)  # a stage of its own that is not planned would hide what is wrong
        self.config, self.device, self._exact = config, device, exact
        self._counting = Counting(config, device.gpu)
        self._objectives = objectives_of(config)
        own = (each for each in self._objectives if type(each).open_teachers is not Objective.open_teachers)
        self.uncounted = [f"objectives.{each.name}" for each in own]
        """What of the recipe no plan has the time and memory of: teachers, whose sizes are in their files."""
        self._averages = (self._objectives.average_decay > 0) + (config.ema_decay > 0)
        self._model = self._objectives.build()
        self._modules = sum(1 for m in self._model.modules() if next(m.parameters(recurse=False), None) is not None)
        self._sizes = tuple(getattr(config.batch, name) for name in STREAMS)
        self._unit = gcd(*self._sizes)
        self._states: dict[Any, Any] = {}
        self._pieces: dict[Any, Any] = {}

    # ------------------------------------------------------------------------------------------------------ layouts

    def layouts(self, devices: int) -> Iterator[Layout]:
        """All that could be, whether or not they divide."""
        accumulations = [n for n in range(1, self._unit + 1) if self._unit % n == 0 and n & (n - 1) == 0]
        stages = (1, 2, 3) if self.config.in_bf16 else (0, 1, 2, 3)
        ranks = [n for n in (1, 2, 4, 8) if n <= self.device.node]
        for tensor, pipeline in product(ranks, (1, 2, 4, 8)):
            sequences = (False, True) if tensor > 1 and not self.config.model.fusion_layers else (False,)
            for zero_stage, sequence, recompute in product(stages, sequences, RECOMPUTES):
                for accumulation in accumulations:
                    yield Layout(zero_stage, tensor, sequence, pipeline, recompute, accumulation)

    def plans(self, devices: int) -> tuple[list[Plan], Counter[str]]:
        """The layouts that fit, fastest first, and why others do not: reason -> layouts."""
        require(devices > 0, f"--devices {devices} is no number of devices")
        found, reasons = [], Counter[str]()
        usable = self.device.memory_gb * USABLE
        for layout in self.layouts(devices):
            try:
                plan = self.plan(layout, devices, usable)
            except ValueError as error:
                reasons[_told(error)] += 1
                continue
            if isinstance(plan, float):
                reasons[f"more memory than the {usable:.1f} GB that are of use of {self.device.memory_gb:g}"] += 1
            else:
                found.append(plan)
        return sorted(found, key=lambda p: (p.time.total, p.memory.total)), reasons

    def plan(self, layout: Layout, devices: int, usable_gb: float = 0) -> Plan | float:
        """What a layout takes; where it is more than `usable_gb`, its memory in GB alone. Raises ValueError where it
        does not divide."""
        ranks = layout.tensor * layout.pipeline
        require(devices % ranks == 0, f"tensor x pipeline does not divide {devices} devices")
        data = devices // ranks
        config = layout.of(self.config)
        micro_batch = config.micro_batch(data)
        records, stages = self._split(layout, config, devices, data)
        least = min(record.states for record in records) / 1e9
        if usable_gb and least > usable_gb:
            return least
        for objective in self._objectives:
            require(not objective.second_pass or layout.pipeline == 1, "a second pass over the model, and a pipeline")
        pieces = self._passed(micro_batch, layout)
        memories = [
            self._memory(layout, config, data, records, stages, pieces, micro_batch, rank)
            for rank in range(layout.pipeline)
        ]
        fullest = max(memories, key=lambda memory: memory.total)
        if usable_gb and fullest.total / 1e9 > usable_gb:
            return fullest.total / 1e9
        largest = max(records, key=lambda record: record.trained)
        time = self._time(layout, config, data, records, stages, pieces, micro_batch, largest)
        kept = 4 * largest.trained / data + (largest.moments + largest.average) / (1 if layout.zero_stage else data)
        tokens = pieces[1].tokens * sum(self._sizes) // sum(pieces[0])
        return Plan(layout, data, micro_batch, fullest, kept / 1e9, time, tokens)

    def _split(
        self, layout: Layout, config: RunConfig, devices: int, data: int
    ) -> tuple[list[StateBytes], StagePlan | None]:
        key = devices, layout.zero_stage, layout.tensor, layout.pipeline, layout.accumulation
        if key not in self._states:
            largest = objectives_of(config).largest
            records = state_bytes(config, devices, self._model, largest, self._averages)
            self._states[key] = records, plan_stages(config, *largest(data))
        return self._states[key]

    # ------------------------------------------------------------------------------------------------------- counts

    def _passed(self, micro_batch: tuple[int, ...], layout: Layout) -> tuple[tuple[int, ...], Pieces, Pieces, float]:
        """Two counts between which, or beyond which, the micro-batch lies, the samples of the first, and how far."""
        recompute, tensor, sequence = layout.activation_checkpointing, layout.tensor, layout.sequence
        count = lambda samples: self._counting.pieces(samples, recompute, tensor, sequence)  # noqa: E731
        if self._exact:
            own = count(micro_batch)
            return micro_batch, own, own, 0.0
        units = sum(micro_batch) * self._unit // sum(self._sizes)
        few, many = (tuple(size // self._unit * n for size in self._sizes) for n in COUNTED)
        return few, count(few), count(many), (units - COUNTED[0]) / (COUNTED[1] - COUNTED[0])

    @staticmethod
    def _between(of: Any, pieces: tuple[Any, Pieces, Pieces, float]) -> float:
        """A number of the micro-batch's pieces, which grows with it by a line."""
        _, few, many, far = pieces
        low = of(few)
        return low if far == 0 else max(0.0, low + far * (of(many) - low))

    # ------------------------------------------------------------------------------------------------------- memory

    def _memory(
        self,
        layout: Layout,
        config: RunConfig,
        data: int,
        records: list[StateBytes],
        stages: StagePlan | None,
        pieces: tuple[Any, Pieces, Pieces, float],
        micro_batch: tuple[int, ...],
        rank: int,
    ) -> Memory:
        record = max((r for r in records if r.pipeline_rank == rank), key=lambda r: r.total)
        trained = record.trained
        size = 2 if config.in_bf16 else 4
        last = rank == layout.pipeline - 1
        # Gradients of one backward pass that stay until the step: below ZeRO-2 all of them.
        passing = size * trained if layout.zero_stage < 2 else 0.0
        standing = record.gradients - passing
        if passing and layout.accumulation > 1 and not config.in_bf16:
            standing, passing = record.gradients, 0.0  # those of the first micro-batch are there in the next ones
        activations, buffers, bottom = self._activations(layout, config, stages, pieces, rank)
        tokenizer, at_targets = 0.0, 0.0
        if last and self._coded(micro_batch):
            tokenizer = self._counting.tokenizer_bytes
            at_targets = self._counting.targets(-(-self._coded(micro_batch) // layout.tensor)).peak
        # Whole gradients are reduced where they lie at ZeRO-0 and, in bf16, at ZeRO-1; else by way of a buffer.
        early = layout.zero_stage > 1 or (layout.zero_stage == 1 and not config.in_bf16)
        top = max(activations, at_targets) + standing + record.bucket * early
        end = bottom + standing + passing + record.bucket
        gradients = standing + (passing if end > top else 0)
        return Memory(
            parameters=record.working,
            gradients=gradients,
            states=record.masters + record.moments,
            buckets=record.bucket if early or end > top else 0.0,
            live=record.live,
            activations=bottom if end > top else max(activations, at_targets),
            pipeline_buffers=buffers,
            average=record.average,
            image_tokenizer=tokenizer,
        )

    def _activations(
        self,
        layout: Layout,
        config: RunConfig,
        stages: StagePlan | None,
        pieces: tuple[Any, Pieces, Pieces, float],
        rank: int,
    ) -> tuple[float, float, float]:
        """Of all micro-batches on their way at the first backward pass, the pipeline's buffers, and at its end."""
        bottom = self._between(lambda p: p.bottom.peak, pieces)
        if stages is None:
            top = self._between(lambda p: p.around.peak + p.layers * p.layer.peak, pieces)
            return top, 0.0, bottom
        layers = sum(len(stage) for stage in stages.of(rank))
        way = min(layout.pipeline - rank, layout.accumulation)
        row = stages.tokens * config.model.width * (2 if config.in_bf16 else 4)
        last = rank == layout.pipeline - 1
        of_layer = self._between(lambda p: p.layer.kept, pieces)
        kept = layers * of_layer
        peak = kept + bottom - of_layer
        if last:
            special = pieces[1].layers and config.model.layers - pieces[1].layers
            kept = (layers - special) * of_layer + self._between(lambda p: p.around.kept, pieces)
            peak = (layers - special) * of_layer + self._between(lambda p: p.around.peak, pieces)
        kept += row * (not last)  # the padded output
        buffers: float = (way + 1) * row * ((rank > 0) + (not last)) + row
        if rank == 0:  # the inputs of a step's micro-batches stay until its end
            buffers += (layout.accumulation - 1) * self._between(lambda p: p.inputs, pieces)
        return (way - 1) * kept + peak, buffers, bottom

    # --------------------------------------------------------------------------------------------------------- time

    def _coded(self, micro_batch: tuple[int, ...]) -> int:
        """Images of a micro-batch that need visual codes made."""
        if self.config.image_codes:
            return 0
        return sum(micro_batch[STREAMS.index(stream)] for stream in self._objectives.coded)

    def _passes_s(self, work: Work, tensor: int) -> tuple[float, float]:
        """Seconds of work, and of the tensor ranks' collectives in it."""
        waited = sum(
            self.device.collective_s(name, size * often, tensor, 1, often)
            for (name, size), often in work.collectives.items()
        )
        return self.device.seconds(work), waited

    def _time(
        self,
        layout: Layout,
        config: RunConfig,
        data: int,
        records: list[StateBytes],
        stages: StagePlan | None,
        pieces: tuple[Any, Pieces, Pieces, float],
        micro_batch: tuple[int, ...],
        largest: StateBytes,
    ) -> Time:
        device, trained = self.device, largest.trained
        size = 2 if config.in_bf16 else 4
        alike = pieces[1].layers

        def of(piece: Any) -> tuple[float, float]:
            seconds: Any = lambda n: lambda p: self._passes_s(piece(p), layout.tensor)[n]  # noqa: E731
            return self._between(seconds(0), pieces), self._between(seconds(1), pieces)

        layer = of(lambda p: p.layer.work)
        # A pipeline's first stage embeds. A model that was counted whole has no layers to take from.
        embedding = of(lambda p: p.bottom.work - p.layer.work) if stages is not None and alike else (0.0, 0.0)
        around = of(lambda p: p.around.work)
        targets = 0.0
        if images := self._coded(micro_batch):
            targets = device.seconds(self._counting.targets(-(-images // layout.tensor)).work)
        slowest, waited, extra = 0.0, 0.0, 0.0
        for rank in range(layout.pipeline):
            layers = alike if stages is None else sum(len(stage) for stage in stages.of(rank))
            is_last = rank == layout.pipeline - 1
            if is_last and stages is not None:
                layers -= config.model.layers - alike
            own, sums = (
                layers * layer[n] + (around[n] - embedding[n]) * is_last + embedding[n] * (rank == 0) for n in (0, 1)
            )
            made = targets * is_last
            if own + sums + made > slowest:
                slowest, waited, extra = own + sums + made, sums, made
        n = layout.accumulation
        more = sum(_forwards(objective, n) for objective in self._objectives) / 3
        passes = n * (slowest - extra) * (1 + more)
        apart = layout.tensor
        shard, moving = trained / data, device.bandwidth * device.memory_share
        # Gradients to their sums: 2 + 4 bytes the first time, by a flat copy and an addition later.
        summed = (size + 4.0) * trained + (n - 1) * (size + size + size + 8.0) * trained
        if layout.zero_stage == 3:
            summed /= data
        if not config.in_bf16:
            summed = (n - 1) * 12.0 * trained + (8.0 * shard if layout.zero_stage else 0)
        # The gradient's norm; the gradient, the master and each moment in the step, the latter read and written.
        of_moments = 2 * largest.moments / (data if layout.zero_stage == 0 else 1)
        stepped = (4 + 12) * shard + of_moments + (size * (trained - shard) if data > 1 else 0)
        stepped += 12 * shard * self._averages
        optimizer = (summed + stepped) / moving if device.gpu else self._on_cpu(summed, stepped)
        if largest.products:
            optimizer += largest.products / device.product_rate(1e12)
        calls = max(1.0, trained / 1e8)
        sent = size * trained
        reduce = device.collective_s("all_reduce", sent, data, apart, calls)
        spread = device.collective_s("all_gather", sent, data, apart, calls)
        hidden = BESIDE * (slowest - extra) if device.gpu else 0.0
        if layout.zero_stage <= 1:
            reduction = max(0.0, reduce - hidden) + spread * layout.zero_stage
        elif layout.zero_stage == 2:
            reduction = n * max(0.0, reduce - hidden) + spread
        else:
            blocks, elements = config.model.layers / layout.pipeline, gathered(largest, layout.activation_checkpointing)
            gathers = blocks * elements / largest.parameters
            fetched = device.collective_s("all_gather", size * elements, data, apart, gathers)
            scattered = device.collective_s("reduce_scatter", sent, data, apart, calls)
            reduction = n * max(0.0, fetched + scattered - (slowest if device.gpu else 0.0))
            passes += n * self._modules / layout.pipeline * FETCHES[layout.activation_checkpointing] * device.fetch_s
        bubble = 0.0
        if stages is not None:
            row = stages.tokens * config.model.width * size
            hop = device.sent_s(row, layout.tensor * data)
            bubble = (layout.pipeline - 1) * (slowest / device.alone + 2 * hop) + 2 * n * hop * (not device.gpu)
        return Time(passes, n * waited, n * extra, bubble, reduction, optimizer)

    def _on_cpu(self, summed: float, stepped: float) -> float:
        rates, moving = self.device.operations, self.device.bandwidth
        return summed / rates.get("add", moving) + stepped / rates.get("fused_adamw", moving)


def _forwards(objective: Any, accumulation: int) -> int:
    """Forward passes of a micro-batch beside the one that is gone backward through."""
    return int(objective.looks_back) + int(objective.looks_ahead and accumulation > 1)


def gathered(part: StateBytes, recompute: Recompute) -> float:
    """Elements that ZeRO-3 gathers in a micro-batch: all of the part once, and once more those of modules between whose
    forward and backward pass DeepSpeed lets them go. For a module with S elements behind it the way to its backward
    pass is FETCHES x S long, so that those stay of which FETCHES x S is less than the reuse distance. Where that is
    short beside the model, DeepSpeed gathers less: what its prefetching has passed by stays, too."""
    return part.parameters + max(0.0, part.parameters - part.reuse_distance / FETCHES[recompute])


def _told(error: ValueError) -> str:
    """A reason without the numbers of one layout, so that equal ones are one."""
    text = str(error)
    for words in ("1F1B needs a micro-batch a stage", "exceed model.layers"):
        if words in text:
            return "fewer micro-batches than stages" if "1F1B" in words else "more stages than layers"
    if "is not divisible by" in text and "data-parallel" in text:
        return "the batch does not divide by replicas x accumulation"
    return text
