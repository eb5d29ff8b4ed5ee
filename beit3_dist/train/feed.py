"""Hands each process the samples that its place in the mesh needs.

The first pipeline stage needs the inputs, the last one the targets; both read for themselves, since a micro-batch is
a function of its number. Stages between learn the lengths and sample ids from one integer table that the first stage
broadcasts at the start of a step; the last stage checks its own ids against it. Of neighbouring tensor ranks, which
work on the same samples, one reads and decodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MicroBatch, Samples, mapped
from beit3_dist.data.order import Stream
from beit3_dist.data.views import Codes
from beit3_dist.objectives.together import Objectives
from beit3_dist.parallel.mesh import Groups, Mesh
from beit3_dist.run.preemption import Read, Together, by_itself
from beit3_dist.train.totals import Totals, host_totals


@dataclass
class StepBatch:
    """A step of this process."""

    micro_batches: list[Any]
    """Its `accumulation` micro-batches on the host; between the first and the last stage without content."""
    totals: Tensor
    """Those of the step, summed over the replicas, as `Totals.pack` writes them: int64 [K + 4] on the device."""
    longest_wait: Tensor
    """Seconds, float64 scalar on the device; see `data_wait_s`."""

    @classmethod
    def agreed(cls, groups: Groups, micro_batches: list[Any], totals: Totals, waited_s: float) -> Self:
        """From what this process knows of its share of the step, and how long it waited for it. Collective."""
        summed = totals.pack().to(groups.mesh.device)
        wait = torch.tensor(waited_s, dtype=torch.float64, device=groups.mesh.device)
        groups.sum_over_data(summed)
        dist.all_reduce(wait, dist.ReduceOp.MAX)
        return cls(micro_batches, summed, wait)

    def add(self, groups: Groups, tokens: int, flops: int) -> None:
        """Adds what this process's share of the step has come to besides, before `known` is asked for. Collective."""
        more = Totals([0] * (len(self.totals) - 4), tokens, flops, 0, 0).pack().to(groups.mesh.device)
        groups.sum_over_data(more)
        self.totals = self.totals + more

    @property
    def data_wait_s(self) -> float:
        """Seconds that the process which waited longest for its samples did so; all others wait for that one."""
        return float(self.longest_wait)

    @property
    def step_counts(self) -> Tensor:
        """int64 [K]: masked positions (fine-tuning: samples) of each loss."""
        return Totals.counts_in(self.totals)

    @cached_property
    def known(self) -> Totals:
        """The totals as numbers. Waits for the device, once."""
        return Totals.unpack(self.totals)


def timed(read: Callable[[], Read]) -> tuple[Read, float]:
    """What `read` gives, and the seconds that it took."""
    started = time.perf_counter()
    return read(), time.perf_counter() - started


def prepared(objectives: Objectives, batch: MicroBatch, mesh: Mesh, codes: Codes | None) -> tuple[Any, ...]:
    """A micro-batch as this process's part of the model takes it, on the device."""
    return objectives.prepare(batch, mesh.device, codes, mesh.pipeline_rank == 0, mesh.is_last_stage)


class Feed:
    """Reads a step's micro-batches where they are needed and tells the other processes what they must know."""

    def __init__(self, config: RunConfig, objectives: Objectives, groups: Groups) -> None:
        self._config, self._objectives, self._groups = config, objectives, groups
        mesh = groups.mesh
        self._has_samples = mesh.pipeline_rank in (0, mesh.pipeline - 1)
        self.reads = self._has_samples and mesh.tensor_rank == 0
        """Whether this process decodes samples."""
        self._prefixes = [(view.stream, view.prefix_by) for view in objectives.views if view.prefix_by]
        """Streams and the objectives that draw where their texts' prefixes end, which the masks of a stage need."""

    def step(self, read: Callable[[], list[MicroBatch]], together: Together = by_itself) -> StepBatch:
        """The micro-batches of a step; `read` is called in the processes that read. Collective."""
        mesh = self._groups.mesh
        batches, waited_s = together(lambda: timed(read if self.reads else list))
        if self._has_samples and mesh.tensor > 1:
            count = self._config.batch.accumulation
            batches = [_broadcast(self._groups, batches[n] if self.reads else None) for n in range(count)]
        if mesh.pipeline > 1:
            batches, totals = self._agree(batches)
        else:
            totals = host_totals(batches, self._objectives)
        return StepBatch.agreed(self._groups, batches, totals, waited_s)

    def _agree(self, batches: list[MicroBatch]) -> tuple[list[MicroBatch], Totals]:
        """The first stage's table on all stages of the pipeline, checked or made into micro-batches without content."""
        mesh, config = self._groups.mesh, self._config
        sizes = {s.field: n for s, n in zip(Stream, config.micro_batch(mesh.data), strict=True) if n}
        if batches:
            totals = host_totals(batches, self._objectives).pack()
            mine = torch.cat([*(_outline(batch, self._prefixes) for batch in batches), totals])
        else:
            totals = torch.zeros(len(self._objectives.told) + 4, dtype=torch.int64)
            columns = sum(n + (Stream[name.upper()].has_text and 1 + n) for name, n in sizes.items())
            columns += sum(sizes[name] for name, _ in self._prefixes)
            mine = torch.zeros(config.batch.accumulation * columns + len(totals), dtype=torch.int64)
        table = mine.to(mesh.device, copy=True)
        dist.broadcast(table, src=dist.get_global_rank(self._groups.pipeline, 0), group=self._groups.pipeline)
        table = table.cpu()
        if batches and not torch.equal(mine, table):
            raise RuntimeError(
                "the first and the last pipeline stage read different samples: do they see the same files?"
            )
        content, totals = table[: -len(totals)], table[-len(totals) :]
        if not batches:
            rows = content.chunk(config.batch.accumulation)
            batches = [_without_content(row, sizes, self._prefixes) for row in rows]
        return batches, Totals.unpack(totals)


def _outline(batch: MicroBatch, prefixes: list[tuple[str, str]]) -> Tensor:
    """int64: of each stream the sample ids and, where it has text, the padded length and the samples' lengths; then the
    prefixes."""
    numbers = []
    for name in sorted(batch.streams):
        samples = batch.streams[name]
        numbers.append(samples.ids)
        if samples.text is not None and samples.lengths is not None:
            numbers += [torch.tensor([samples.text.shape[1]]), samples.lengths]
    return torch.cat([*numbers, *(batch.streams[name].annotations[owner]["prefix"] for name, owner in prefixes)])


def _without_content(outline: Tensor, sizes: dict[str, int], prefixes: list[tuple[str, str]]) -> MicroBatch:
    """A micro-batch that has only its lengths and sample ids, from its outline. `sizes`: samples of each stream."""
    streams = {}
    for name in sorted(sizes):
        n = sizes[name]
        ids, outline = outline.split([n, len(outline) - n])
        streams[name] = Samples(ids, torch.zeros_like(ids))
        if Stream[name.upper()].has_text:
            width, lengths, outline = outline.split([1, n, len(outline) - n - 1])
            streams[name] = replace(streams[name], text=torch.zeros(n, int(width), dtype=torch.int64), lengths=lengths)
    for name, owner in prefixes:
        prefix, outline = outline.split([sizes[name], len(outline) - sizes[name]])
        streams[name].annotations[owner] = {"prefix": prefix}
    return MicroBatch(streams)


class _Shape(NamedTuple):
    """Stands for a tensor that comes."""

    shape: torch.Size
    dtype: torch.dtype


def _broadcast(groups: Groups, batch: MicroBatch | None) -> MicroBatch:
    """The first tensor rank's micro-batch on all of them, from host to host: the device, which computes meanwhile, is
    not waited for."""
    group = groups.tensor_hosts
    source = dist.get_global_rank(group, 0)
    tensors: list[Tensor] = []

    def shape_of(tensor: Tensor) -> _Shape:
        tensors.append(tensor)
        return _Shape(tensor.shape, tensor.dtype)

    header: list[Any] = [None if batch is None else mapped(batch, Tensor, shape_of)]
    dist.broadcast_object_list(header, src=source, group=group)
    shapes: list[_Shape] = []
    mapped(header[0], _Shape, shapes.append)
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in shapes]
    if batch is None:
        content = torch.empty(sum(sizes), dtype=torch.uint8)
    else:
        content = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    dist.broadcast(content, src=source, group=group)
    if batch is not None:
        return batch
    parts = iter(content.split(sizes))
    return mapped(header[0], _Shape, lambda to_be: next(parts).clone().view(to_be.dtype).view(to_be.shape))
