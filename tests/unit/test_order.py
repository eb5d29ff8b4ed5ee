"""The order is a keyed bijection, the same everywhere, and well mixed even for a few samples."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_dist.data.order import (
    SLOTS,
    Blocks,
    Interleave,
    Numbers,
    Stream,
    generator,
    mix,
    mix_arrays,
    mix_of_many,
    mix_on,
    permute,
    sample_id,
    scheduled,
)

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def test_mix_is_splitmix64() -> None:
    """The first outputs of splitmix64 for seeds 0 and 1234567, from its published reference."""
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(1234567) == 6457827717110365317


@given(keys=st.lists(INT64, max_size=5), use=st.integers(0, 9), first=st.integers(0, 1 << 40))
@settings(deadline=None)
def test_numbers_are_hashes(keys: list[int], use: int, first: int) -> None:
    """The upper 53 bits of a hash over 2^53, whichever numbers and samples are asked for beside it."""
    found = Numbers(keys, use)(first, 3)
    assert found.shape == (len(keys), 3) and found.dtype == np.float64
    assert found.tolist() == [[(mix(key, use, first + n) >> 11) / (1 << 53) for n in range(3)] for key in keys]


def test_numbers_are_uniform() -> None:
    """In 100 bins, among the numbers of one sample and among the samples: chi-squared has 99 degrees of freedom, so a
    mean of 99 and a deviation of 14."""
    for numbers in (Numbers([5], 1)(0, 100_000), Numbers(range(100_000), 1)(7, 1)):
        counts = np.bincount((numbers.ravel() * 100).astype(int), minlength=100)
        assert 99 - 5 * 14 < ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * 14


def test_mix_depends_on_order_and_number() -> None:
    assert len({mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(0, 1, 2), mix(1)}) == 5


@given(st.lists(st.tuples(INT64, INT64, INT64), min_size=1, max_size=20))
@settings(deadline=None)
def test_arrays_are_hashed_like_integers(rows: list[tuple[int, int, int]]) -> None:
    columns = np.array(rows, dtype=np.int64).T
    assert mix_arrays(*columns).tolist() == [mix(*row) for row in rows]


@given(length=st.integers(1, 3000), key=st.integers(0, (1 << 64) - 1))
@settings(deadline=None, max_examples=60)
def test_permute_is_a_bijection(length: int, key: int) -> None:
    assert sorted(permute(position, length, key) for position in range(length)) == list(range(length))


@given(length=st.integers(1, 1 << 45), key=st.integers(0, (1 << 64) - 1), data=st.data())
@settings(deadline=None)
def test_permute_stays_inside_and_apart_at_any_length(length: int, key: int, data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=20))
    images = {permute(place, length, key) for place in places}
    assert len(images) == len(places) and all(0 <= image < length for image in images)


@pytest.mark.parametrize(("length", "places"), [(2, 2), (3, 3), (4, 4), (5, 3), (6, 3), (17, 2)])
def test_short_orders_are_equally_frequent(length: int, places: int) -> None:
    """Chi-square over the orders of the first places, 100 keys each: below its mean plus five standard deviations.

    From length 5 on, the last two places follow from the parity: a Feistel network only makes even permutations.
    """
    orders = list(permutations(range(length), places))
    keys = 100 * len(orders)
    counts = Counter(tuple(permute(place, length, mix(7, key)) for place in range(places)) for key in range(keys))
    chi_square = sum((counts[order] - 100) ** 2 / 100 for order in orders)
    freedom = len(orders) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_neighbours_are_not_kept() -> None:
    """In a random order a sample follows its neighbour once per epoch on average; a weak network does so often."""
    length = 5000
    order = np.array([permute(place, length, 3) for place in range(length)])
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 15
    assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.07  # Five standard deviations of 1 / sqrt(5000).


def test_permute_refuses_positions_outside() -> None:
    with pytest.raises(IndexError, match="position 5 is not in range"):
        permute(5, 5, 0)


@given(
    length=st.integers(1, 3000), block=st.integers(1, 300), blocks=st.integers(1, 9), key=st.integers(0, (1 << 64) - 1)
)
@settings(deadline=None, max_examples=60)
def test_blocks_are_a_bijection_and_windows_hold_few_of_them(length: int, block: int, blocks: int, key: int) -> None:
    order = Blocks(block, block * blocks)
    found = [order.permute(position, length, key) for position in range(length)]
    assert sorted(found) == list(range(length))
    for number in range(-(-length // order.window)):
        window = found[number * order.window : (number + 1) * order.window]
        runs = 1 + np.count_nonzero(np.diff(sorted(window)) != 1)
        assert runs <= blocks + 3  # A window begins and ends inside a block, and may hold the short one.


def test_blocks_come_in_any_order_and_differ_by_epoch() -> None:
    """Where the short last block comes, and which block is first: all are equally frequent over 4,000 keys."""
    order = Blocks(3, 3)
    first = Counter(order._in_block_order(0, 11, mix(1, key)) // 3 for key in range(4000))
    assert all(abs(first[block] - 1000) < 5 * 27.4 for block in range(4))  # Five standard deviations.
    epochs = [
        [scheduled(place, 11, 0, 0, order)[1] for place in range(11 * epoch, 11 * epoch + 11)] for epoch in (0, 1)
    ]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))


def quality(order: list[int]) -> tuple[float, int]:
    """Mean distance in stored order of samples that are read one after the other, as a share of a full shuffle's (a
    third of the length), and how often the next sample is a stored neighbour."""
    steps = np.abs(np.diff(order))
    return float(steps.mean() / (len(order) / 3)), int(np.count_nonzero(steps == 1))


def test_quality_of_the_block_shuffle() -> None:
    """16 blocks of 64 in a window, 64 windows. A full shuffle keeps 2 neighbours a round."""
    length = 65_536
    order, window = Blocks(64, 1024), 1024
    distance, neighbours = quality([order.permute(place, length, 3) for place in range(length)])
    full_distance, full_neighbours = quality([permute(place, length, 3) for place in range(length)])
    assert 0.97 < full_distance < 1.03 and full_neighbours < 10
    # Two samples of a window lie in different blocks 15 times of 16, and these are anywhere.
    assert 0.88 < distance < 1.0
    # One of 1,024 others in the window follows, two of them (but at the ends of blocks) are neighbours.
    assert abs(neighbours - 2 * length / window) < 5 * (2 * length / window) ** 0.5


def test_every_epoch_holds_every_sample_once_in_another_order() -> None:
    length = 37
    found = [scheduled(position, length, 5, Stream.TEXTS) for position in range(3 * length)]
    orders = [[index for epoch, index in found if epoch == wanted] for wanted in range(3)]
    assert all(sorted(order) == list(range(length)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != [scheduled(position, length, 5, Stream.PAIRS)[1] for position in range(length)]
    assert orders[0] != [scheduled(position, length, 6, Stream.TEXTS)[1] for position in range(length)]


def test_sample_ids_fit_int64_and_differ() -> None:
    ids = [sample_id(stream, epoch, index) for stream in Stream for epoch in range(5) for index in range(200)]
    assert len(set(ids)) == len(ids)
    assert np.array(ids, dtype=np.int64).tolist() == ids
    assert min(ids) < 0 < max(ids)


def test_generators_depend_on_the_key_alone() -> None:
    assert generator(1, 2).random() == generator(1, 2).random() != generator(2, 1).random()


@given(st.lists(st.floats(0.5, 50), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_interleave_is_exact_and_even(weights: list[float]) -> None:
    pattern = Interleave(weights)
    total = sum(weights)
    places = [pattern.locate(position) for position in range(2 * SLOTS)]
    for source, weight in enumerate(weights):
        own = [place for number, place in places if number == source]
        assert own == list(range(len(own)))  # Every position of a source, in turn.
        assert abs(len(own) / 2 - SLOTS * weight / total) < 1
        served = np.cumsum([number == source for number, _ in places])
        ahead = served - len(own) / (2 * SLOTS) * np.arange(1, 2 * SLOTS + 1)
        assert np.abs(ahead).max() <= len(weights)  # Never bunched: at most one sample per source off the even spread.


def test_too_small_a_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="weight 0.001 is less than 1/1000"):
        Interleave([0.001, 9.0])


def test_a_hash_goes_on_where_it_stands() -> None:
    for values in ((3, 1, 2**63), (0, 5, -7)):
        assert mix_on(mix_of_many(*values), 11) == mix(*values, 11) == mix_of_many(*values, 11)
        assert mix_on(mix(*values), -4) == mix(*values, -4)


def test_numbers_begin_with_the_hash_of_key_and_use() -> None:
    keys = [0, 9, -2, (1 << 64) - 1]
    assert Numbers(keys, 6).states.tolist() == [mix(key, 6) for key in keys]
    assert Numbers([], 6)(0, 3).shape == (0, 3)
