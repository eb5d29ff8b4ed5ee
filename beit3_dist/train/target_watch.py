"""Whether there is anything to learn: how far the targets of a run differ from one another.

An image tokenizer that gives one code for all patches, or a text tokenizer whose every word is <unk>, makes a loss that
falls to 0 and an accuracy of 1. The entropy of the targets tells it from success.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.objectives.masked_data_modeling import STREAMS, Targets
from beit3_dist.parallel.mesh import Mesh

COLLAPSED = 0.05
"""Entropy in nats (of 100 targets one is another) below which targets are one: nothing is learnt from them."""
FIRST, EVERY = 10, 100
"""Every one of the first steps is measured, and then one of so many."""
ENOUGH = 50
"""Targets from which alone something is said."""
NAMES = {
    "image": ("pictures", "the code {}: look at image_tokenizer with tools/show_codes.py"),
    "text": ("texts", "the word {}: does text_tokenizer know this language?"),
    "pair_image": ("pictures of pairs", "the code {}: look at image_tokenizer with tools/show_codes.py"),
    "pair_text": ("captions of pairs", "the word {}: does text_tokenizer know this language?"),
}
"""What a stream's targets are of, and what to do where they are one."""

log = logging.getLogger(__name__)


def entropy(counts: Tensor) -> float:
    """Entropy in nats of the empirical distribution, -sum p log p; 0 where nothing was counted.

    A finite sample misses rare targets, so the true entropy is rather a little higher than this.
    """
    p = counts[counts > 0].double() / counts.sum()
    return abs(float((p * p.log()).sum()))


def collapse(name: str, counts: Tensor) -> str:
    """What is wrong with the targets of a stream, counted by code or word; empty if nothing is."""
    number, most = int(counts.sum()), int(counts.argmax())
    if number < ENOUGH or entropy(counts) >= COLLAPSED:
        return ""
    titles, remedy = NAMES[name]
    return (
        f"the targets of {titles} have collapsed: {float(counts[most]) / number:.1%} of {number:,} (entropy "
        f"{entropy(counts):.3f} nats) are {remedy.format(most)}. The loss falls without anything being learnt"
    )


class TargetWatch:
    """Counts the targets of the steps of a pretraining run that are measured. Every process has one."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        self._mesh = mesh
        self._sizes = [config.visual_vocab_size if "image" in name else config.vocab_size for name in STREAMS]
        self._step = torch.zeros(sum(self._sizes), dtype=torch.int64, device=mesh.device)
        self._recent = [torch.zeros(size, dtype=torch.int64) for size in self._sizes]
        """Counted since a stream last had ENOUGH."""
        self._told: set[str] = set()

    @staticmethod
    def is_due(step: int) -> bool:
        """Whether a step, counted from 1, is measured."""
        return step <= FIRST or step % EVERY == 0

    def add(self, targets: Targets) -> None:
        """Counts the targets of one of the step's micro-batches. Does not wait for the device."""
        if self._mesh.tensor_rank:
            return  # neighbours have the same
        image, text, pair_image, pair_text = targets.counts
        codes, words = targets.codes.split([image, pair_image]), targets.words.split([pair_text, text])
        streams = (codes[0], words[1], codes[1], words[0])  # in the order of STREAMS
        for counts, values in zip(self._step.split(self._sizes), streams, strict=True):
            counts.index_add_(0, values, torch.ones_like(values))

    def measure(self) -> dict[str, float]:
        """The fields of the step's record: entropies in nats. Says once, on the first process, which streams have
        collapsed. Collective."""
        dist.all_reduce(self._step)
        counted = self._step.cpu().split(self._sizes)
        entropies = {f"entropy_{name}": entropy(counts) for name, counts in zip(STREAMS, counted, strict=True)}
        for name, recent, counts in zip(STREAMS, self._recent, counted, strict=True):
            recent += counts
            if recent.sum() >= ENOUGH:
                if (words := collapse(name, recent)) and name not in self._told and self._mesh.is_first:
                    self._told.add(name)
                    log.warning(words)
                recent.zero_()
        self._step.zero_()
        return entropies
