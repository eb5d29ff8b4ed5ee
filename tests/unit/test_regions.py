"""What detectors do with boxes, against cases counted by hand and torchvision's definition in Python."""

from __future__ import annotations

import logging
import math
from importlib import import_module

import pytest
import torch

from beit3_dist.tasks.parts import regions


def boxes(*of: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(of, dtype=torch.float32).view(-1, 4)


def random_boxes(count: int, side: float, seed: int) -> torch.Tensor:
    drawn = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) * side
    return torch.cat([torch.minimum(drawn[:, :2], drawn[:, 2:]), torch.maximum(drawn[:, :2], drawn[:, 2:])], 1)


def test_overlaps_by_hand() -> None:
    some = boxes((0, 0, 4, 4), (0, 0, 0, 0), (5, 5, 3, 3))
    others = boxes((0, 0, 4, 4), (2, 2, 6, 6), (4, 4, 8, 8), (0, 0, 0, 0))
    assert regions.overlaps(some, others)[0].tolist() == [1, pytest.approx(4 / 28), 0, 0]
    assert regions.overlaps(some, others)[1:].count_nonzero() == 0  # empty, and inside out
    assert regions.areas(some).tolist() == [16, 0, 0]


def test_offsets_lead_back() -> None:
    starts, ends = random_boxes(50, 40, 0) + boxes((0, 0, 1, 1)), random_boxes(50, 40, 1) + boxes((0, 0, 1, 1))
    weights = (10.0, 10.0, 5.0, 5.0)
    moves = regions.offsets(starts, ends, weights)
    torch.testing.assert_close(regions.moved(starts, moves[:, None], weights)[:, 0], ends, rtol=1e-4, atol=1e-4)
    by_hand = regions.offsets(boxes((0, 0, 10, 20)), boxes((5, 0, 25, 20)), (1.0,) * 4)
    assert by_hand.tolist() == [[1.0, 0.0, pytest.approx(math.log(2)), 0.0]]
    grown = regions.moved(boxes((0, 0, 16, 16)), torch.full((1, 1, 4), 99.0), (1.0,) * 4)[0, 0]
    assert (grown[2] - grown[0]).item() == pytest.approx(1000)  # no more at once


def test_anchors_by_hand() -> None:
    around = regions.anchors(2, 3, 4, torch.device("cpu")).view(2, 3, 3, 4)
    assert around[0, 0, 1].tolist() == [-16, -16, 16, 16]  # as Lin et al.: 32 x 32 at stride 4
    assert around[1, 2, 1].tolist() == [8 - 16, 4 - 16, 8 + 16, 4 + 16]
    sides = around[0, 0, :, 2:] - around[0, 0, :, :2]
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(sides.prod(1), torch.full((3,), 32.0**2))


def greedy(some: torch.Tensor, scores: torch.Tensor, threshold: float) -> list[int]:
    kept: list[int] = []
    for place in scores.argsort(descending=True).tolist():
        if all(regions.overlaps(some[place][None], some[other][None]) <= threshold for other in kept):
            kept.append(place)
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_suppression_is_the_greedy_choice(threshold: float) -> None:
    some, scores = random_boxes(60, 20, 2), torch.rand(60, generator=torch.Generator().manual_seed(3))
    assert regions.plain_nms(some, scores, threshold).tolist() == greedy(some, scores, threshold)
    groups = torch.arange(60) % 3
    expected = [n for g in range(3) for n in torch.nonzero(groups == g)[:, 0][
        greedy(some[groups == g], scores[groups == g], threshold)].tolist()]  # fmt: skip
    found = regions.suppressed(some, scores, groups, threshold).tolist()
    assert found == sorted(expected, key=lambda n: -scores[n])


def test_suppression_by_hand() -> None:
    some = boxes((0, 0, 10, 10), (0, 0, 10, 8), (0, 0, 10, 5), (20, 0, 30, 10))
    scores, alike = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.zeros(4, dtype=torch.int64)
    assert regions.suppressed(some, scores, alike, 0.5).tolist() == [0, 2, 3]  # .8 goes; .5 is not more than .5
    assert regions.suppressed(some, scores, torch.tensor([0, 1, 0, 0]), 0.5).tolist() == [0, 1, 2, 3]
    assert regions.suppressed(some[:0], scores[:0], alike[:0], 0.5).tolist() == []
    kept, given = regions.softly_suppressed(some, scores, alike, 0.5, 4)
    assert kept.tolist() == [0, 2, 3, 1]  # .8 x (1 - .8) = .16, then x (1 - 5 / 8) = .06 by the third
    assert given.tolist() == pytest.approx([0.9, 0.7, 0.6, 0.8 * 0.2 * 0.375])


@pytest.mark.parametrize("size", [2, 7])
def test_pooling_is_torchvisions(size: int) -> None:
    """Boxes that cover less than a cell, or many. (What is further out than a cell is nothing in its C++ alone.)"""
    _roi_align = import_module("torchvision.ops.roi_align")._roi_align.__wrapped__  # not compiled
    image = torch.randn(2, 3, 12, 17, generator=torch.Generator().manual_seed(4), requires_grad=True)
    some = torch.cat([random_boxes(20, 48, 5), boxes((3, 3, 3.5, 47))])
    whose = torch.arange(len(some)) % 2
    ours = regions.plain_roi_align(image, some, whose, 4, size)
    rows = torch.cat([whose[:, None].float(), some], 1)
    torch.testing.assert_close(ours, _roi_align(image, rows, 1 / 4, size, size, -1, True), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(ours.square().sum(), image)
    (expected,) = torch.autograd.grad(_roi_align(image, rows, 1 / 4, size, size, -1, True).square().sum(), image)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert regions.roi_align(image, some[:0], whose[:0], 4, size).shape == (0, 3, size, size)
    nowhere = boxes((-40, -40, -20, -20), (0, 0, 0, 0))
    assert regions.plain_roi_align(image, nowhere, whose[:2], 4, size).count_nonzero() == 0


def test_pooling_of_a_slope_by_hand() -> None:
    """Bilinear samples of x are x: a bin's mean is its centre's. Cell n lies at pixel stride * (n + .5)."""
    slope = torch.arange(16.0).expand(1, 1, 16, 16)
    (got,) = regions.plain_roi_align(slope, boxes((8, 8, 40, 40)), torch.zeros(1, dtype=torch.int64), 4, 4)
    assert got[0, 0].tolist() == [pytest.approx((8 + 8 * n + 4) / 4 - 0.5) for n in range(4)]


def test_a_box_is_pooled_from_the_level_of_its_size() -> None:
    levels = [torch.full((1, 1, 256 >> n, 256 >> n), float(n)) for n in range(4)]
    some = boxes(*((0, 0, side, side) for side in (20, 111, 112, 224, 448, 900)))
    got = regions.pooled(levels, [4, 8, 16, 32], some, torch.zeros(6, dtype=torch.int64), 1).flatten().tolist()
    assert got == pytest.approx([0, 0, 1, 2, 3, 3])  # Lin et al. 2017: 4 + log2(side / 224), of 2 to 5


def test_matching_by_hand() -> None:
    truths = boxes((0, 0, 10, 10), (50, 50, 60, 60))
    some = boxes((0, 0, 10, 8), (0, 0, 10, 4), (30, 30, 40, 40), (50, 50, 60, 51), (0, 0, 10, 2))
    background, between = regions.BACKGROUND, regions.BETWEEN
    assert regions.matched(some, truths, 0.3, 0.7).tolist() == [0, between, background, background, background]
    assert regions.matched(some, truths, 0.3, 0.7, weak=True).tolist() == [0, between, background, 1, background]
    assert regions.matched(some, truths[:0], 0.3, 0.7).tolist() == [background] * 5


def test_draws_belong_to_boxes_whatever_their_order() -> None:
    ids, key = torch.arange(1000), torch.tensor(7)
    draws = regions.draws(key, 1, ids)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(regions.draws(key, 1, ids[order]), draws[order]) and (draws >= 0).all()
    assert not torch.equal(draws, regions.draws(key, 2, ids)) and not torch.equal(draws, regions.draws(key + 1, 1, ids))
    among = ids % 3 == 0
    kept = regions.chosen(among, draws, 40)
    assert len(kept) == 40 == len(set(kept.tolist())) and (kept % 3 == 0).all()
    assert set(ids[order][regions.chosen(among[order], draws[order], 40)].tolist()) == set(kept.tolist())
    assert sorted(regions.chosen(ids < 5, draws, 40).tolist()) == [0, 1, 2, 3, 4]


def test_doing_without_torchvision_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    regions.torchvision_operators.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = [regions.torchvision_operators("cpu") for _ in range(2)]
    said = [record.message for record in caplog.records if "plain torch suppresses and pools boxes" in record.message]
    assert len(said) == (found[0] is None)
