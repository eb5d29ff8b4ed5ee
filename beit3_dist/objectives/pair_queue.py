"""Contrast with the pairs of a moving average of the model: those of the step and a queue of earlier ones (ALBEF).

A replica's own image is told from the average's texts, its text from the average's images. These have no gradient, so
that losses add up over micro-batches and replicas as they are. Shape letters: n pairs of a micro-batch of this replica,
N of the step over all replicas, Q of the queue, E the vectors' length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from beit3_dist.objectives.contrast import Vectors, in_common, joined
from beit3_dist.parallel.replicas import Replicas

PIECES = (48, 32, 16, 0)
"""A hash, int64, is kept as numbers of 16 bits, which float32 holds exactly."""


@dataclass(frozen=True)
class TaughtPairs:
    """What the average says of a micro-batch's pairs, without gradient."""

    own: Vectors
    """Its vectors of them."""
    images: Tensor
    """[N + Q, E]: its vectors of the images that texts are told apart by."""
    texts: Tensor
    """[N + Q, E]."""
    right: Tensor
    """int64 [n]: which of them are the own ones."""
    out: Tensor
    """bool [n, N + Q]: which are not there, or have the image or the caption in common without being the own ones."""
    alpha: float
    """Share of the targets that is the average's."""

    def contrast(self, pairs: Vectors, alpha: float) -> Tensor:
        """[2, n]: the mean of the cross-entropies of both directions of each pair, and of its two hits.

        Targets are alpha softmax(s v_m . T) + (1 - alpha) the own one (ALBEF, eq. 6), s the student's scale.
        """
        scale = pairs.scale.detach()
        found = []
        for mine, teachers, candidates in (
            (pairs.images, self.own.images, self.texts),
            (pairs.texts, self.own.texts, self.images),
        ):
            logits = (pairs.scale * mine @ candidates.T).masked_fill(self.out, -torch.inf)
            soft = (scale * teachers @ candidates.T).masked_fill(self.out, -torch.inf).softmax(1)
            shares = (alpha * soft).scatter_add_(1, self.right[:, None], soft.new_full((len(soft), 1), 1 - alpha))
            losses = -(shares * logits.log_softmax(1).masked_fill(self.out, 0.0)).sum(1)
            found.append(torch.stack([losses, (logits.argmax(1) == self.right).float()]))
        return (found[0] + found[1]) / 2


class PairQueue:
    """The last Q pairs of former steps, the same on all ranks and in any layout."""

    def __init__(self, size: int, length: int, device: torch.device) -> None:
        self._length = length
        self.rows = torch.zeros(size, 2 * length + 2 * len(PIECES) + 1, device=device)
        """float32 [Q, 2 E + 9], the oldest first: vectors of image and text, the pieces of both hashes, and 1 where
        there is a pair."""
        self._step = self.rows[:0]

    def teach(
        self, found: Sequence[Vectors], places: Sequence[Tensor], replicas: Replicas, alpha: float
    ) -> list[TaughtPairs]:
        """For each micro-batch of this replica's what it is taught, from the average's vectors, with labels, and the
        pairs' places in the step. Collective."""
        whole = joined(found)
        assert whole.labels is not None
        pieces = torch.stack([whole.labels >> shift & 0xFFFF for shift in PIECES], 2).flatten(1)
        mine = torch.cat([whole.images, whole.texts, pieces.float(), torch.ones_like(pieces[:, :1])], dim=1)
        everyones, order = replicas.gather_constant(mine), replicas.gather_constant(torch.cat([*places]))
        self._step = torch.empty_like(everyones).index_copy_(0, order, everyones)
        candidates = torch.cat([self._step, self.rows])
        images, texts, hashes, there = candidates.split([self._length, self._length, 2 * len(PIECES), 1], dim=1)
        shifts = torch.tensor(PIECES, device=hashes.device)
        labels = (hashes.long().unflatten(1, (2, len(PIECES))) << shifts).sum(2)
        taught = []
        for own, right in zip(found, places, strict=True):
            assert own.labels is not None
            out = in_common(own.labels, labels) | (there[:, 0] == 0)
            out = out.scatter(1, right[:, None], False)
            taught.append(TaughtPairs(own, images, texts, right, out, alpha))
        return taught

    def keep(self) -> None:
        """The step's pairs are the newest from here on."""
        if len(self.rows):
            self.rows = torch.cat([self.rows, self._step])[-len(self.rows) :]
