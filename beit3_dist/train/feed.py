"""Hands each process the samples that its place in the mesh needs.

The first pipeline stage needs the inputs, the last one the targets; both read for themselves, since a micro-batch is
a function of its number. Stages between learn the lengths and sample ids from one integer table that the first stage
broadcasts at the start of a step; the last stage checks its own ids against it. Of neighbouring tensor ranks, which
work on the same samples, one reads and decodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.preemption import Read, Together, by_itself
from beit3_dist.train.inputs import host_totals
from beit3_dist.train.totals import Totals


@dataclass
class StepBatch:
    """A step of this process."""

    micro_batches: list[Any]
    """Its `accumulation` micro-batches on the host; between the first and the last stage without content."""
    totals: Tensor
    """Those of the step, summed over the replicas, as `Totals.pack` lays them out: int64 [K + 4] on the device."""
    longest_wait: Tensor
    """Seconds, float64 scalar on the device; see `data_wait_s`."""

    @classmethod
    def agreed(cls, groups: Groups, micro_batches: list[Any], totals: Totals, waited_s: float) -> Self:
        """From what this process knows of its share of the step, and how long it waited for it. Collective."""
        summed = totals.pack().to(groups.mesh.device)
        wait = torch.tensor(waited_s, dtype=torch.float64, device=groups.mesh.device)
        groups.sum_over_data(summed)
        groups.max_over_all(wait)
        return cls(micro_batches, summed, wait)

    @property
    def data_wait_s(self) -> float:
        """Seconds that the process which waited longest for its samples did so; all others wait for that one."""
        return float(self.longest_wait)

    @property
    def step_counts(self) -> Tensor:
        """int64 [K]: masked positions (fine-tuning: samples) of each loss."""
        return Totals.counts_in(self.totals)

    @cached_property
    def _known(self) -> Totals:
        return Totals.unpack(self.totals)

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self._known.tokens

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward."""
        return self._known.flops

    @property
    def replaced(self) -> int:
        """Samples that had to be replaced."""
        return self._known.replaced

    @property
    def sample_hash(self) -> str:
        """Hash of the delivered sample ids, in hexadecimal."""
        return f"{self._known.hash_terms % (1 << 64):016x}"


def timed(read: Callable[[], Read]) -> tuple[Read, float]:
    """What `read` gives, and the seconds that it took."""
    started = time.perf_counter()
    return read(), time.perf_counter() - started


class Feed:
    """Reads a step's micro-batches where they are needed and tells the other processes what they must know."""

    def __init__(self, config: RunConfig, groups: Groups) -> None:
        self._config, self._groups = config, groups
        mesh = groups.mesh
        self._has_samples = mesh.pipeline_rank in (0, mesh.pipeline - 1)
        self.reads = self._has_samples and mesh.tensor_rank == 0
        """Whether this process decodes samples."""

    def step(self, read: Callable[[], list[MicroBatch]], together: Together = by_itself) -> StepBatch:
        """The micro-batches of a step; `read` is called in the processes that read. Collective."""
        mesh = self._groups.mesh
        batches, waited_s = together(lambda: timed(read if self.reads else list))
        if self._has_samples and mesh.tensor > 1:
            count = self._config.batch.accumulation
            batches = [_broadcast(self._groups, batches[n] if self.reads else None) for n in range(count)]
        totals = host_totals(batches, self._config.model)
        if mesh.pipeline > 1:
            batches, totals = self._agree(batches, totals)
        return StepBatch.agreed(self._groups, batches, totals, waited_s)

    def _agree(self, batches: list[MicroBatch], totals: Totals) -> tuple[list[MicroBatch], Totals]:
        """The first stage's table on all stages of the pipeline, checked or made into micro-batches without content."""
        mesh, packed = self._groups.mesh, totals.pack()
        images, texts, pairs = self._config.micro_batch(mesh.data)
        sizes = [2, pairs, texts, images + pairs + texts]
        if batches:
            rows = [
                torch.cat(
                    [
                        torch.tensor([b.captions.shape[1], b.texts.shape[1]]),
                        b.caption_lengths,
                        b.text_lengths,
                        b.sample_ids,
                    ]
                )
                for b in batches
            ]
            mine = torch.cat([*rows, packed])
        else:
            mine = torch.zeros(self._config.batch.accumulation * sum(sizes) + len(packed), dtype=torch.int64)
        table = mine.to(mesh.device, copy=True)
        dist.broadcast(table, src=dist.get_global_rank(self._groups.pipeline, 0), group=self._groups.pipeline)
        table = table.cpu()
        if batches and not torch.equal(mine, table):
            raise RuntimeError(
                "the first and the last pipeline stage read different samples: do they see the same files?"
            )
        content, packed = table[: -len(packed)], table[-len(packed) :]
        if not batches:
            batches = [_without_content(self._config, *row.split(sizes)) for row in content.view(-1, sum(sizes))]
        return batches, Totals.unpack(packed)


def _without_content(config: RunConfig, widths: Tensor, captions: Tensor, texts: Tensor, ids: Tensor) -> MicroBatch:
    """A micro-batch that has only its lengths and sample ids."""
    caption_width, text_width = widths.tolist()
    pictures = len(ids) - len(texts)

    def words(samples: int, width: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(samples, width, dtype=torch.int64), torch.zeros(samples, width, dtype=torch.bool)

    caption_words, no_captions = words(len(captions), caption_width)
    text_words, no_texts = words(len(texts), text_width)
    return MicroBatch(
        images=torch.zeros(pictures, 3, 0, 0, dtype=torch.uint8),
        tokenizer_images=None,
        image_mask=torch.zeros(pictures, config.model.patches, dtype=torch.bool),
        captions=caption_words,
        caption_targets=caption_words,
        caption_mask=no_captions,
        caption_lengths=captions,
        texts=text_words,
        text_targets=text_words,
        text_mask=no_texts,
        text_lengths=texts,
        sample_ids=ids,
        positions=torch.zeros_like(ids),
        streams=torch.zeros_like(ids),
        faults=[],
    )


def _broadcast(groups: Groups, batch: MicroBatch | None) -> MicroBatch:
    """The first tensor rank's micro-batch on all of them, on the host."""
    device, group = groups.mesh.device, groups.tensor
    source = dist.get_global_rank(group, 0)
    names = [f.name for f in fields(MicroBatch) if f.name != "faults"]
    header: list[Any] = [None, None]
    if batch is not None:
        tensors = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
        header = [
            [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()],
            batch.faults,
        ]
    dist.broadcast_object_list(header, src=source, group=group, device=device)
    layout = [(name, shape, getattr(torch, dtype)) for name, shape, dtype in header[0]]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in layout]
    if batch is None:
        content = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    else:
        content = torch.cat([tensors[name].flatten().view(torch.uint8) for name, _, _ in layout]).to(device)
    dist.broadcast(content, src=source, group=group)
    if batch is not None:
        return batch
    parts = content.cpu().split(sizes)
    received: dict[str, Any] = {"tokenizer_images": None, "faults": header[1]}
    for (name, shape, dtype), part in zip(layout, parts, strict=True):
        received[name] = part.clone().view(dtype).view(shape)
    return MicroBatch(**received)
