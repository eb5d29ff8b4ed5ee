"""Hard negatives: drawn as their weights say, never a true match, never failing, alike at any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from beit3_dist.objectives.contrast import Vectors
from beit3_dist.objectives.mining import draw_negatives
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.replicas import ALONE, Replicas
from tests.parallel.workers import run_workers

PAIRS = 8
LABELS = torch.tensor([[0, 10], [1, 11], [0, 12], [3, 13], [4, 11], [5, 15], [6, 16], [7, 17]])
"""Hashes of images and captions: 0 and 2 have one image, 1 and 4 one caption."""
IDS = torch.arange(PAIRS) * 1_000_003 - 5_000_000


def vectors(scale: float = 3.0) -> Vectors:
    draw = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(PAIRS, 5, generator=draw), dim=1) for _ in range(2))
    return Vectors(images, texts, torch.tensor([scale]))


def drawn(keys: int, labels: Tensor = LABELS, **changes: Any) -> tuple[Tensor, Tensor]:
    """Captions of images and images of captions, int64 [keys, PAIRS]."""
    found = [draw_negatives(vectors(**changes), labels, IDS, ALONE, key) for key in range(keys)]
    return torch.stack([one.captions for one in found]), torch.stack([one.images for one in found])


def test_draws_have_the_shares_of_the_softmax_over_what_is_no_match() -> None:
    number = 4000
    pairs, found = vectors(), drawn(number)
    similarity = pairs.scale * pairs.images @ pairs.texts.T
    match = (LABELS[:, None] == LABELS).any(2)
    for chosen, scores in zip(found, (similarity, similarity.T), strict=True):
        for row in range(PAIRS):
            shares = scores[row].masked_fill(match[row], -torch.inf).softmax(0)
            counts = torch.bincount(chosen[:, row], minlength=PAIRS)
            assert counts[match[row]].sum() == 0
            expected = (shares * number)[~match[row]]
            chi_square = ((counts[~match[row]] - expected) ** 2 / expected).sum()
            assert chi_square < 27  # of 4 to 6 degrees of freedom: once in 10,000 rows


def test_without_vectors_all_that_are_no_match_are_drawn_alike() -> None:
    number = 1000
    found = [draw_negatives(None, LABELS, IDS, ALONE, key) for key in range(number)]
    match = (LABELS[:, None] == LABELS).any(2)
    for chosen in (torch.stack([one.captions for one in found]), torch.stack([one.images for one in found])):
        for row in range(PAIRS):
            counts = torch.bincount(chosen[:, row], minlength=PAIRS)
            assert counts[match[row]].sum() == 0
            expected = number / int((~match[row]).sum())
            assert ((counts[~match[row]] - expected) ** 2 / expected).sum() < 27


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e6])
def test_no_sharpness_makes_it_fail(scale: float) -> None:
    """Where multinomial draws have weights that are all zero."""
    captions, images = drawn(20, scale=scale)
    for chosen in (captions, images):
        assert (chosen >= 0).all()
        assert not (LABELS[chosen] == LABELS).any()
    equal = Vectors(torch.ones(PAIRS, 1), torch.ones(PAIRS, 1), torch.tensor([scale]))
    found = draw_negatives(equal, LABELS, IDS, ALONE, 0)
    assert (found.captions >= 0).all()


def test_where_all_pairs_match_there_is_none() -> None:
    labels = torch.tensor([[0, n] for n in range(PAIRS - 1)] + [[1, PAIRS]])
    captions, images = drawn(5, labels)
    assert (captions[:, :-1] == PAIRS - 1).all() and (images[:, :-1] == PAIRS - 1).all()
    assert (drawn(5, torch.zeros_like(labels))[0] == -1).all()


def test_draws_depend_on_the_key_and_on_the_direction() -> None:
    captions, images = drawn(50)
    assert (captions[0] != captions[1]).any() and (captions != images).float().mean() > 0.3


def on_a_rank(groups: Groups, near: bool) -> tuple[list[int], ...]:
    replicas = Replicas(groups.data)
    mine = torch.arange(PAIRS).chunk(replicas.size)[replicas.rank]
    pairs = vectors()
    own = Vectors(pairs.images[mine], pairs.texts[mine], pairs.scale)
    found = draw_negatives(own, LABELS[mine], IDS[mine], replicas, 7, near)
    alike = draw_negatives(None, LABELS[mine], IDS[mine], replicas, 7, near)
    return found.captions.tolist(), found.images.tolist(), alike.captions.tolist(), alike.images.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_draws_alike(world: int) -> None:
    hard, alike = (draw_negatives(of, LABELS, IDS, ALONE, 7) for of in (vectors(), None))
    joined = [sum(parts, []) for parts in zip(*run_workers(world, on_a_rank, False), strict=True)]
    assert joined == [part.tolist() for found in (hard, alike) for part in (found.captions, found.images)]


@pytest.mark.slow
def test_near_negatives_are_the_ranks_own() -> None:
    for rank, both in enumerate(run_workers(2, on_a_rank, True)):
        assert all(number // (PAIRS // 2) == rank for chosen in both for number in chosen)
