"""Scores of a model as it is, by whoever makes its vectors and captions: `inference.Model`, or a training's engine.

Names are those of CLIP_benchmark's results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_dist.tasks.data.zero_shot import Captioned, Classed
from beit3_dist.tasks.parts.frozen import class_accuracies, names_as_vectors, neighbours_votes, probe_scores
from beit3_dist.tasks.parts.metrics import caption_scores, recall, reranked, shortlists

NEIGHBOURS = (10, 20, 100, 200)

Vectors = Callable[[Sequence[Any]], Tensor]
"""N images, by where they lie, or texts -> [N, D]."""
Match = Callable[[Tensor, Tensor], Tensor]
"""Numbers of images and of texts, int64 [P] -> how well each fits the other, [P]."""


def retrieval_scores(
    pairs: Captioned,
    images: Vectors,
    texts: Vectors,
    merged: bool = False,
    best: int = 0,
    match: Callable[[Sequence[str]], Match] | None = None,
) -> dict[str, float]:
    """Recalls of both ways by unit vectors. `merged`: captions that are equal are one, right for the images of all.
    `best`: so many of each are put in order by what `match` makes of the texts."""
    listed = [(number, text) for number, own in enumerate(pairs.captions) for text in own]
    rows = {text: row for row, text in enumerate(dict.fromkeys(text for _, text in listed))}
    shown = [*rows] if merged else [text for _, text in listed]
    of_text = torch.tensor([rows[text] for _, text in listed]) if merged else None
    of_image = torch.tensor([image for image, _ in listed])
    vectors, more = (images(pairs.images), texts(shown)), None
    if match is not None and best:
        chosen = shortlists(*vectors, best)
        wanted = (chosen[0] | chosen[1]).nonzero()
        more = reranked(chosen, wanted, match(shown)(*wanted.T))
    found = recall(*vectors, of_image, of_text, more)
    return {name.replace("_recall", "_retrieval_recall"): value for name, value in found.items()}


def name_scores(classed: Classed, images: Vectors, texts: Vectors) -> dict[str, float]:
    """Classes by the closest name, in all templates."""
    by_name = names_as_vectors(texts, classed.names, classed.templates)
    return class_accuracies(images(classed.images) @ by_name.T, classed.labels)


def caption_matches(
    pairs: Captioned, write: Callable[[Sequence[Any]], list[str]], metrics: Sequence[str]
) -> dict[str, float]:
    """`caption_scores` of what `write` says of the images."""
    return caption_scores(dict(enumerate(write(pairs.images))), dict(enumerate(pairs.captions)), metrics)


def neighbour_scores(
    train_MD: Tensor, known: Tensor, test_ND: Tensor, labels: Tensor, classes: int
) -> dict[str, float]:
    """Classes `labels` by the nearest of the vectors `train_MD`, of classes `known`, for each number of them that there
    are; none where there are fewer than the least."""
    votes = {k: neighbours_votes(train_MD, known, test_ND, classes, k) for k in NEIGHBOURS if k <= len(train_MD)}
    return {f"knn{k}_{n}": v for k, votes_NC in votes.items() for n, v in class_accuracies(votes_NC, labels).items()}


def linear_scores(
    train_MD: Tensor, known: Tensor, test_ND: Tensor, labels: Tensor, classes: int
) -> tuple[dict[str, float], float]:
    """Classes by a linear probe, and the decay that it has chosen."""
    scores, decay = probe_scores(train_MD, known, test_ND, classes)
    return {f"lp_{name}": value for name, value in class_accuracies(scores, labels).items()}, decay
