"""What the host knows of a step's samples without having computed anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from beit3_dist.data.batch import MicroBatch, hash_terms
from beit3_dist.objectives.base import View
from beit3_dist.objectives.together import Objectives
from beit3_dist.train.flops import NOTHING_UNSEEN, Unseen, pretraining_flops


@dataclass(frozen=True)
class Totals:
    """Of some samples of a step. Sums over micro-batches and ranks are the step's own; those of int64 wrap."""

    counts: list[int]
    """[K]: what each of the K losses is divided by, masked positions or samples."""
    tokens: int
    """Without padding."""
    flops: int
    """Of forward and backward."""
    replaced: int
    """Samples that had to be replaced."""
    hash_terms: int
    """Sum of the terms of the sample hash, as an int64."""

    @property
    def sample_hash(self) -> str:
        """Hash of the delivered sample ids, in hexadecimal."""
        return f"{self.hash_terms % (1 << 64):016x}"

    def pack(self) -> Tensor:
        """int64 [K + 4]."""
        return torch.tensor([*self.counts, self.tokens, self.flops, self.replaced, self.hash_terms])

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """From what `pack` gives, or a sum of such. Waits for the device."""
        *counts, tokens, flops, replaced, hash_terms = packed.tolist()
        return cls(counts, tokens, flops, replaced, hash_terms)

    @staticmethod
    def counts_in(packed: Tensor) -> Tensor:
        """The counts int64 [K] in what `pack` gives, where it lies: the device is not waited for."""
        return packed[:-4]

    @classmethod
    def summed(cls, parts: Iterable[Self], losses: int) -> Self:
        """The sum of any number of parts, each with `losses` counts."""
        return cls.unpack(sum((part.pack() for part in parts), torch.zeros(losses + 4, dtype=torch.int64)))


def host_totals(batches: list[MicroBatch], objectives: Objectives) -> Totals:
    """Of a rank's micro-batches; the counts are those of the objectives' targets."""
    return Totals.summed((_totals(batch, objectives) for batch in batches), len(objectives.told))


def _totals(batch: MicroBatch, objectives: Objectives) -> Totals:
    counts, known = objectives.counts(batch), objectives.on_host(batch)
    lengths: list[list[Tensor]] = [[], [], []]
    for view in objectives.views:
        samples = batch.streams[view.stream]
        lengths[view.kind].append(view.lengths(samples))
    images, captions, texts = (torch.cat([torch.zeros(0, dtype=torch.int64), *some]) for some in lengths)
    patches = 1 + objectives.model.patches
    unseen = sum((_unseen(batch, view, patches) for view in objectives.views), NOTHING_UNSEEN)
    return Totals(
        counts,
        tokens=known.layout.tokens,
        flops=pretraining_flops(objectives, len(images), captions, texts, known.read, counts, unseen)
        + round(3 * sum(objective.sample_flops(batch) for objective in objectives)),
        replaced=len(batch.faults),
        hash_terms=hash_terms(batch),
    )


def _unseen(batch: MicroBatch, view: View, patches: int) -> Unseen:
    samples = batch.streams[view.stream]
    if not view.prefix_by or view.ends or samples.lengths is None:
        return NOTHING_UNSEEN
    return Unseen.under_prefix(patches * view.image, samples.lengths, samples.annotations[view.prefix_by]["prefix"])
