"""What tells that two pictures or two texts are nearly the same, by kept libraries: imagehash and datasketch."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from beit3_dist.optional import optional_module

REMEDY = "pip install -e '.[data]' brings it"
CELLS = 8
"""Along each side of a picture, of which the mean colours are compared: perceptual hashes see none, and of a flat
drawing little else."""
PICTURE = np.dtype([("hash", "<u8"), ("colours", "u1", 3 * CELLS * CELLS)])
"""A picture's print: perceptual hash and mean colours."""
BITS, LEVELS = 4, 16
"""Pictures are alike where so many of the 64 bits differ at most, and mean colours by so many of 255 levels."""
PERMUTATIONS, BANDS = 64, 16
TEXT = np.dtype([("hash", "<u8"), ("bands", "<u8", BANDS)])
"""A text's print: hash of the normalised text, and 16 bits of each minimum (b-bit MinHash, Li and Koenig 2010), four
of them to a band; zeros of a short text."""
SHINGLE, FEWEST_WORDS, MOST_WORDS = 3, 8, 20_000
"""Words of a shingle; texts with fewer words are compared by their hash alone, of longer ones the beginning is."""
ALIKE = 0.8
"""Texts are alike where so large a share of their shingles is in common (Jaccard), by estimate."""
ROUNDS = 8
"""How often a bucket's samples that are unlike its first one get a first one of their own."""


def content_hash(data: bytes) -> int:
    """64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def picture_print(image: Image.Image) -> np.ndarray:
    """PICTURE [1] of an RGB image."""
    hashing = optional_module("imagehash", "the comparison of pictures", REMEDY)
    bits = np.packbits(hashing.phash(image).hash.flatten())
    colours = image.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()
    return np.array([(bits.view("<u8")[0], np.frombuffer(colours, dtype=np.uint8))], dtype=PICTURE)


def text_print(text: str) -> np.ndarray:
    """TEXT [1]. Case and spaces do not count."""
    words = text.lower().split()
    found = np.zeros(1, dtype=TEXT)
    found["hash"] = content_hash(" ".join(words).encode())
    if len(words) >= FEWEST_WORDS:
        words = words[:MOST_WORDS]
        shingles = {" ".join(words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}
        sketch = _sketch()
        sketch.clear()
        sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
        found["bands"] = (sketch.hashvalues & 0xFFFF).astype("<u2").view("<u8")
    return found


@cache
def _sketch() -> Any:
    """One for all texts: its permutations take longer than a text."""
    return optional_module("datasketch", "the comparison of texts", REMEDY).MinHash(num_perm=PERMUTATIONS, seed=1)


def same(hashes: np.ndarray) -> np.ndarray:
    """int64 [n]: the first of all that have each one's hash, uint64 [n]."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def alike_pictures(prints: np.ndarray, bits: int = BITS) -> np.ndarray:
    """int64 [n]: the first picture that each of PICTURE [n] is like; itself where there is none before.

    Of hashes that differ in `bits` bits, at least two of bits + 2 blocks are equal: each two of them are a key.
    """
    ends = np.linspace(0, 64, bits + 3).astype(int)
    blocks = [
        (prints["hash"] >> np.uint64(start)) & np.uint64((1 << int(end - start)) - 1)
        for start, end in itertools.pairwise(ends)
    ]
    hashes, colours = prints["hash"], prints["colours"]

    def alike(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        near = np.bitwise_count(hashes[some] ^ hashes[others]) <= bits
        far = np.abs(colours[some].astype(np.int16) - colours[others]).max(1, initial=0)
        return near & (far <= LEVELS)

    keys = (a << np.uint64(32) | b for a, b in itertools.combinations(blocks, 2))
    return _first_alike(len(prints), keys, alike)


def alike_texts(prints: np.ndarray) -> np.ndarray:
    """int64 [n]: the first text that each of TEXT [n] is like; itself where there is none before."""
    long = np.flatnonzero(prints["bands"].any(1))
    bands = prints["bands"][long]
    minima = np.ascontiguousarray(bands).view("<u2").reshape(len(long), PERMUTATIONS)

    def alike(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        return (minima[some] == minima[others]).mean(1) >= ALIKE

    found = same(prints["hash"])
    near = long[_first_alike(len(long), (bands[:, band] for band in range(BANDS)), alike)]
    found[long] = np.where(found[long] != long, found[long], near)
    return _roots(found)


def _first_alike(
    count: int, keys: Iterator[np.ndarray], alike: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """int64 [count]: the first sample that each is like. Compared are those that have one of the `keys`, uint64
    [count], in common, each with the first of its bucket, and so on with those that are unlike it."""
    first = np.arange(count)
    for key in keys:
        left = np.flatnonzero(first == np.arange(count))
        for _ in range(ROUNDS):
            order = left[np.argsort(key[left], kind="stable")]
            begins = np.concatenate([[True], key[order][1:] != key[order][:-1]]) if len(order) else np.zeros(0, bool)
            heads = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))] if len(order) else order
            others = ~begins
            some, of = order[others], heads[others]
            near = alike(some, of)
            first[some[near]] = of[near]
            left = np.sort(some[~near])
            if not len(left):
                break
    return _roots(first)


def _roots(first: np.ndarray) -> np.ndarray:
    """What each is like in the end, where one it is like is like another."""
    while True:
        further = first[first]
        if np.array_equal(further, first):
            return first
        first = further


def joined(parts: Sequence[np.ndarray], kind: np.dtype) -> np.ndarray:
    """One array of many, or none."""
    return np.concatenate([np.zeros(0, dtype=kind), *parts])
