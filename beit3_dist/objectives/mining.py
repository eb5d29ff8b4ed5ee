"""Hard negatives: for each image another caption, and the reverse, drawn by how alike their vectors are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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


@dataclass(frozen=True)
class Shown:
    """3 n pairs to be told apart from matches: n that match, their captions with drawn images, their images with drawn
    captions."""

    images: Tensor
    """[3 n, ...]."""
    words: Tensor
    """int64 [3 n, longest]."""
    lengths: Tensor
    """int64 [3 n]: of the captions."""
    ids: Tensor
    """int64 [3 n]: what each draws its drop path by."""
    counted: Tensor
    """bool [3 n]; False: there was no negative, the pair itself stands in, and counts for nothing."""


def with_negatives(
    drawn: Negatives,
    first: int,
    ids: Tensor,
    own: list[Tensor],
    replicas: Replicas,
    held: int,
    give: Callable[[Tensor], list[Tensor]],
) -> Shown:
    """The pairs `first` to `first` + n - 1 of this replica's `held`, beside what was `drawn` for them. `ids` int64 [n];
    `own`: their images, words and lengths; `give`: the same of rows of this replica's pairs, as `Replicas.fetch` takes
    it."""
    n, mine = len(ids), slice(first, first + len(ids))
    wanted = torch.cat([drawn.images[mine], drawn.captions[mine]])
    valid = wanted >= 0
    itself = replicas.rank * held + torch.arange(first, first + n, device=ids.device)
    wanted = torch.where(valid, wanted, itself.repeat(2))
    mixed = hash64_tensor(drawn.ids[wanted]) ^ ids.repeat(2)
    others = replicas.fetch(wanted, held, give)
    return Shown(
        images=torch.cat([own[0], others[0][:n], own[0]]),
        words=torch.cat([own[1], own[1], others[1][n:]]),
        lengths=torch.cat([own[2], own[2], others[2][n:]]),
        ids=torch.cat([ids, mixed[:n], ~mixed[n:]]),
        counted=torch.cat([valid.new_ones(n), valid]),
    )


def matching_losses(logits_M2: Tensor, counted: Tensor) -> Tensor:
    """[2, M]: cross-entropies of the logits of no match and match of `Shown` pairs, and hits; 0 where one does not
    count."""
    logits_M2 = logits_M2.float()
    right = (torch.arange(len(logits_M2), device=logits_M2.device) < len(logits_M2) // 3).long()
    losses = cross_entropy(logits_M2, right, reduction="none")
    return torch.stack([losses, (logits_M2.argmax(1) == right).float()]) * counted


def _largest(scores: Tensor, out: Tensor) -> Tensor:
    """int64 [n]: the largest of each row of [n, N] that is not `out`; -1 where all are."""
    return torch.where(out.all(1), -1, scores.masked_fill(out, -torch.inf).argmax(1))


def gumbel(mine: Tensor, others: Tensor, key: int) -> Tensor:
    """Noise float64 [n, N] for ids int64 [n] and [N]: -log(-log u) of numbers u that are uniform in (0, 1)."""
    keyed = hash64_tensor(mine ^ signed(hash64(key & WORD)))
    words = hash64_tensor(keyed[:, None] ^ hash64_tensor(others))
    uniform = (right_shift(words, 12).double() + 0.5) * 2.0**-52
    return -(-uniform.log()).log()
