"""Whether there is anything to learn: how far the targets of a run differ from one another.

An image tokenizer that gives one code for all patches, or a text tokenizer whose every word is <unk>, makes a loss that
falls to 0 and an accuracy of 1. The entropy of the targets tells it from success.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.objectives.base import Loss
from beit3_dist.objectives.together import Objectives, Reading
from beit3_dist.parallel.mesh import Mesh

COLLAPSED = 0.05
"""Entropy in nats (of 100 targets one is another) below which targets are one: nothing is learnt from them."""
FIRST, EVERY = 10, 100
"""Every one of the first steps is measured, and then one of so many."""
ENOUGH = 50
"""Targets from which alone something is said."""

log = logging.getLogger(__name__)


def entropy(counts: Tensor) -> float:
    """Entropy in nats of the empirical distribution, -sum p log p; 0 where nothing was counted.

    A finite sample misses rare targets, so the true entropy is rather a little higher than this.
    """
    p = counts[counts > 0].double() / counts.sum()
    return abs(float((p * p.log()).sum()))


def collapse(loss: Loss, counts: Tensor) -> str:
    """What is wrong with the targets of a loss, counted by class; empty if nothing is."""
    number, most = int(counts.sum()), int(counts.argmax())
    if number < ENOUGH or entropy(counts) >= COLLAPSED:
        return ""
    return (
        f"the targets of {loss.title} have collapsed: {float(counts[most]) / number:.1%} of {number:,} (entropy "
        f"{entropy(counts):.3f} nats) are {loss.remedy.format(most)}. The loss falls without anything being learnt"
    )


class TargetWatch:
    """Counts the targets of the steps of a pretraining run that are measured. Every process has one."""

    def __init__(self, objectives: Objectives, mesh: Mesh) -> None:
        self._objectives, self._mesh = objectives, mesh
        self._losses = [loss for loss in objectives.losses if loss.classes]
        self._sizes = [loss.classes for loss in self._losses]
        self._step = torch.zeros(sum(self._sizes), dtype=torch.int64, device=mesh.device)
        self._recent = [torch.zeros(size, dtype=torch.int64) for size in self._sizes]
        """Counted since there last was ENOUGH of a loss."""
        self._told: set[str] = set()

    @staticmethod
    def is_due(step: int) -> bool:
        """Whether a step, counted from 1, is measured."""
        return step <= FIRST or step % EVERY == 0

    def add(self, reading: Reading) -> None:
        """Counts the targets of one of the step's micro-batches. Does not wait for the device."""
        if self._mesh.tensor_rank:
            return  # neighbours have the same
        counts = dict(zip((loss.name for loss in self._losses), self._step.split(self._sizes), strict=True))
        for loss, values in (reading.objectives or self._objectives).classes(reading):
            if loss.classes:
                counts[loss.name].index_add_(0, values, torch.ones_like(values))

    def measure(self) -> dict[str, float]:
        """The fields of the step's record: entropies in nats. Says once, on the first process, which streams have
        collapsed. Collective."""
        dist.all_reduce(self._step)
        counted = self._step.cpu().split(self._sizes)
        entropies = {f"entropy_{loss.name}": entropy(n) for loss, n in zip(self._losses, counted, strict=True)}
        for loss, recent, counts in zip(self._losses, self._recent, counted, strict=True):
            recent += counts
            if recent.sum() >= ENOUGH:
                if (words := collapse(loss, recent)) and loss.name not in self._told and self._mesh.is_first:
                    self._told.add(loss.name)
                    log.warning(words)
                recent.zero_()
        self._step.zero_()
        return entropies
