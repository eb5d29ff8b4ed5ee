"""Hard negatives: for each image another caption, and the reverse, drawn by how alike their vectors are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beit3_dist.hashing import WORD, hash64, hash64_tensor, right_shift, signed
from beit3_dist.objectives.contrast import Vectors, in_common
from beit3_dist.parallel.replicas import Replicas


@dataclass(frozen=True)
class Negatives:
    """What was drawn for n pairs of this replica, out of the pairs of all: numbers int64 [n], replica by replica."""

    captions: Tensor
    """Of the pair whose caption each image is shown with; -1 where no pair has another image and another caption."""
    images: Tensor
    """Of the pair whose image each caption is shown with, likewise."""
    ids: Tensor
    """int64 [N]: ids of the pairs of all replicas."""


def draw_negatives(
    vectors: Vectors | None, labels: Tensor, ids: Tensor, replicas: Replicas, key: int, near: bool = False
) -> Negatives:
    """Draws by the shares of the softmax over a row of the scaled similarities (ALBEF, Li et al. 2021), after all pairs
    are left out that have the image or the caption in common: `labels` int64 [n, 2], hashes of either.

    The draw adds Gumbel noise to the similarities and takes the largest, which cannot fail however sharp they are. The
    noise is a function of (`key`, id of the one, id of the other), so that any number of replicas draws alike. `ids`
    int64 [n]. `vectors`: None draws all of them with equal shares. `near`: only out of this replica's own pairs.
    """
    others, everyones = replicas.gather_constant(labels), replicas.gather_constant(ids)
    out = in_common(labels, others)
    if near:
        first, places = replicas.rank * len(ids), torch.arange(len(everyones), device=ids.device)
        out = out | ((places < first) | (places >= first + len(ids)))
    noises = [gumbel(ids, everyones, key + direction) for direction in range(2)]
    if vectors is not None:
        images, texts = replicas.gather_constant(vectors.images), replicas.gather_constant(vectors.texts)
        scores = vectors.scale * vectors.images @ texts.T, vectors.scale * vectors.texts @ images.T
        noises = [s.double() + noise for s, noise in zip(scores, noises, strict=True)]
    captions, drawn = (_largest(noisy, out) for noisy in noises)
    return Negatives(captions, drawn, everyones)


def _largest(scores: Tensor, out: Tensor) -> Tensor:
    """int64 [n]: the largest of each row of [n, N] that is not `out`; -1 where all are."""
    return torch.where(out.all(1), -1, scores.masked_fill(out, -torch.inf).argmax(1))


def gumbel(mine: Tensor, others: Tensor, key: int) -> Tensor:
    """Noise float64 [n, N] for ids int64 [n] and [N]: -log(-log u) of numbers u that are uniform in (0, 1)."""
    keyed = hash64_tensor(mine ^ signed(hash64(key & WORD)))
    words = hash64_tensor(keyed[:, None] ^ hash64_tensor(others))
    uniform = (right_shift(words, 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()
