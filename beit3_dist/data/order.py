"""The order of the samples, without state: every draw is a pure function of integers.

A position in a stream becomes (epoch, index) through a keyed permutation in O(1), so that a resume needs nothing but
the number of samples consumed, and any number of ranks, workers or micro-batches reads the same global batches.
`mix` is the one source of keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from beit3_dist.hashing import WORD, hash64, hash64_array, signed

ROUNDS = 8
"""Feistel rounds; four suffice for large domains, the others mix lengths of a few samples."""
SLOTS = 1000
"""Length of the repeating pattern that interleaves weighted sources."""


class Stream(IntEnum):
    """The three streams; also their number in keys and sample ids."""

    IMAGES = 0
    TEXTS = 1
    PAIRS = 2

    @property
    def field(self) -> str:
        """Its name in configs, batches and records."""
        return self.name.lower()

    @property
    def has_images(self) -> bool:
        return self is not Stream.TEXTS

    @property
    def has_text(self) -> bool:
        return self is not Stream.IMAGES


def mix_on(state: int, value: int) -> int:
    """`mix` of the integers that `state` is the hash of and one more."""
    return hash64((state ^ value) & WORD)


def mix(*values: int) -> int:
    """64-bit hash of integers in their order; a negative one counts as its two's complement."""
    return reduce(mix_on, values, 0)


@lru_cache(maxsize=256)
def mix_of_many(*values: int) -> int:
    return mix(*values)


def mix_arrays(*values: np.ndarray) -> np.ndarray:
    """`mix` for 64-bit integer arrays of one shape, element by element -> uint64."""
    state = np.zeros(values[0].shape, dtype=np.uint64)
    for value in values:
        state = hash64_array(state ^ value.astype(np.int64).view(np.uint64))
    return state


def hash_sum(*values: np.ndarray) -> int:
    """Sum of `mix_arrays`, modulo 2^64, as a signed integer: what the samples of a step add to its sample_hash."""
    return int(mix_arrays(*values).sum(dtype=np.uint64).astype(np.int64))


class Numbers:
    """Random numbers of many samples at once: number n of a sample is a hash of (the sample's key, use, n). A generator
    for each sample would take longer than all that is done with its numbers."""

    def __init__(self, keys: Iterable[int], use: int) -> None:
        known = np.fromiter((key & WORD for key in keys), dtype=np.uint64)
        self.states = mix_arrays(known, np.full_like(known, use))

    def __call__(self, first: int, count: int) -> np.ndarray:
        """Numbers first, first + 1, ... of each sample, uniform in [0, 1): float64 [samples, count]."""
        words = hash64_array(self.states[:, None] ^ np.arange(first, first + count, dtype=np.uint64))
        return (words >> np.uint64(11)) * 2.0**-53


class _Key(np.random.bit_generator.ISeedSequence):
    """Hands Philox its key as it is. `Philox(key=...)` does the same, but asks the system for entropy first, which
    takes longer than all draws of an image."""

    def __init__(self, key: int) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        """The key and 64 zeros, uint64 [2]: what Philox asks for."""
        return np.array([self.key, 0], dtype=np.uint64)


def generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on the key alone (Philox is counter-based and has the same stream everywhere)."""
    seed: Any = _Key(mix(*key))  # numpy's stubs do not know this kind
    return np.random.Generator(np.random.Philox(seed))


@lru_cache(maxsize=256)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(mix(key, number) for number in range(ROUNDS))


def permute(position: int, length: int, key: int) -> int:
    """Keyed bijection of range(length): a Feistel network on the next even power of two, walked until it is inside. The
    network has fewer than 4 x length values, so a walk takes fewer than four turns on average."""
    if not 0 <= position < length:
        raise IndexError(f"position {position} is not in range({length})")
    half = ((length - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for round_key in _round_keys(key):
            left, right = right, left ^ (hash64(right ^ round_key) & low)
        position = left << half | right
        if position < length:
            return position


@dataclass(frozen=True)
class Blocks:
    """A shuffle for storage that reads neighbours fastest: blocks of neighbours in keyed order, and a keyed order
    inside each window of some blocks. Like `permute` a keyed bijection in O(1)."""

    block: int
    """Neighbours in stored order that stay in one window or two."""
    window: int
    """Samples that are shuffled among one another."""

    def permute(self, position: int, length: int, key: int) -> int:
        number, place = divmod(position, self.window)
        start = number * self.window
        place = start + permute(place, min(self.window, length - start), mix(key, number))
        return self._in_block_order(place, length, key)

    def _in_block_order(self, place: int, length: int, key: int) -> int:
        """The index at a place where only the blocks are shuffled; the short last block comes at a keyed place."""
        blocks, rest = divmod(length, self.block)
        short = mix(key, -1) % (blocks + 1) * self.block
        if short <= place < short + rest:
            return blocks * self.block + place - short
        block, inside = divmod(place - rest if place >= short else place, self.block)
        return permute(block, blocks, mix(key, -2)) * self.block + inside


def scheduled(position: int, length: int, seed: int, stream: int, blocks: Blocks | None = None) -> tuple[int, int]:
    """Epoch and sample index at a position of an endless stream: every epoch holds each index once."""
    epoch, place = divmod(position, length)
    key = mix_of_many(seed, stream, epoch)
    return epoch, blocks.permute(place, length, key) if blocks else permute(place, length, key)


def sample_id(stream: int, epoch: int, index: int) -> int:
    """64-bit name of a delivered sample, as a signed integer that fits a torch int64."""
    return signed(mix_on(mix_of_many(stream, epoch), index))


def tempered(weights: list[float], temperature: float) -> list[float]:
    """weight^(1 / temperature) of each, the largest being 1; at temperature 1 the weights as they are."""
    if temperature == 1:
        return weights
    return [(weight / max(weights)) ** (1 / temperature) for weight in weights]


class Interleave:
    """Position of a stream -> (source, position in that source), in O(1) and in exact proportion to the weights. A
    pattern of 1,000 slots repeats. Each source gets its share of the slots by largest remainder, evenly spread."""

    def __init__(self, weights: list[float]) -> None:
        shares = SLOTS * np.asarray(weights, dtype=np.float64) / sum(weights)
        quotas = np.floor(shares).astype(np.int64)
        behind = np.argsort(quotas - shares, kind="stable")
        quotas[behind[: SLOTS - quotas.sum()]] += 1
        if quotas.min() == 0:
            weight = weights[int(quotas.argmin())]
            raise ValueError(
                f"the weight {weight:g} is less than 1/{SLOTS} of the sum of the weights: leave that source out, or "
                "raise data.temperature"
            )
        places = np.concatenate([(np.arange(quota) + 0.5) / quota for quota in quotas])
        sources = np.repeat(np.arange(len(weights)), quotas)
        self.source = sources[np.argsort(places, kind="stable")]
        self.ordinal = np.empty(SLOTS, dtype=np.int64)
        for number, quota in enumerate(quotas):
            self.ordinal[self.source == number] = np.arange(quota)
        self.quotas = quotas

    def locate(self, position: int) -> tuple[int, int]:
        """The source that serves `position`, and how many samples it served before."""
        turn, slot = divmod(position, SLOTS)
        source = int(self.source[slot])
        return source, turn * int(self.quotas[source]) + int(self.ordinal[slot])

    def counts(self, positions: np.ndarray) -> np.ndarray:
        """int64 [sources]: how many of these positions each source serves."""
        return np.bincount(self.source[positions % SLOTS], minlength=len(self.quotas))
