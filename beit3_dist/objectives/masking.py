"""Which patches and words are hidden: block-wise masks for pictures, BERT's 80/10/10 for words.

All counts are exact, so that the work of a step and the weight of a sample do not fluctuate. All draws come from the
generator that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

MIN_BLOCK_SHARE = 16 / 196
"""BEiT's smallest block, 16 patches, as a share of its 14 x 14 grid: smaller grids get smaller blocks."""
MIN_ASPECT = 0.3
"""A block's height over its width lies in [0.3, 1 / 0.3]."""
ATTEMPTS = 10
"""Blocks that are tried before the rest is filled with single patches."""
DRAWN_AT_ONCE = 48
"""Random numbers of one call: enough for most pictures."""


def mask_count(ratio: float, n: int) -> int:
    """How many of n patches or words are masked: at least one."""
    return max(1, round(ratio * n))


def min_block(grid: int, count: int) -> int:
    """Smallest block in patches: 16 from a 14 x 14 grid on, in proportion below, never more than is to be masked."""
    return max(1, min(16, round(MIN_BLOCK_SHARE * grid * grid), count))


def block_mask(grid: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly `count` masked patches in rectangular blocks (BEiT, algorithm 1) -> bool [grid * grid], True = masked.

    Blocks are drawn until none of ten fits into what is left to mask; single patches then fill up to the count.
    """
    if not 0 <= count <= grid * grid:
        raise ValueError(f"cannot mask {count} of {grid * grid} patches")
    # Python's numbers throughout: arrays of this size take ten times as long. The mask has a bit per patch, row by row.
    draws = _uniform(rng)
    smallest, mask, left = min_block(grid, count), 0, count
    while left and (block := _new_block(mask, grid, smallest, left, draws)):
        mask |= block
        left = count - mask.bit_count()
    while mask.bit_count() < count:
        mask |= 1 << int(next(draws) * grid * grid)
    bits = np.frombuffer(mask.to_bytes(-(-grid * grid // 8), "little"), dtype=np.uint8)
    return np.unpackbits(bits, count=grid * grid, bitorder="little").view(bool)


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    """Numbers in [0, 1), drawn many at a time."""
    while True:
        yield from rng.random(DRAWN_AT_ONCE).tolist()


def _new_block(mask: int, grid: int, smallest: int, left: int, draws: Iterator[float]) -> int:
    """One more block that masks at most `left` new patches; 0 if none was found."""
    for _ in range(ATTEMPTS):
        area = smallest + next(draws) * max(0, left - smallest)
        aspect = MIN_ASPECT ** (1 - 2 * next(draws))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height <= grid and 0 < width <= grid):
            continue
        top, start = int(next(draws) * (grid - height + 1)), int(next(draws) * (grid - width + 1))
        rows = ((1 << grid * height) - 1) // ((1 << grid) - 1)  # the first bit of each row
        block = ((1 << width) - 1) * rows << top * grid + start
        if 0 < (block & ~mask).bit_count() <= left:
            return block
    return 0


def mask_words(
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    ratio: float,
    specials: tuple[int, ...],
    mask_id: int,
    words: range,
    mask_token_share: float,
    random_token_share: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the words to predict and hides them -> (inputs int64 [L], predict bool [L]).

    `mask_count(ratio, words of the text)` words are chosen; `specials` (<s>, </s>, <pad>) are neither counted nor
    chosen. Each chosen word becomes `mask_id` with probability `mask_token_share`, one of `words` with probability
    `random_token_share`, and else stays. A text without words has nothing to predict.
    """
    inputs = np.array(ids, dtype=np.int64)
    predict = np.zeros(len(inputs), dtype=bool)
    ordinary = np.ones(len(inputs), dtype=bool)
    for special in specials:
        ordinary &= inputs != special
    candidates = np.flatnonzero(ordinary)
    if len(candidates) == 0:
        return inputs, predict
    chosen = rng.permutation(candidates)[: mask_count(ratio, len(candidates))]
    fate = rng.random(len(chosen))
    substitutes = rng.integers(words.start, words.stop, size=len(chosen))
    swapped = np.where(fate < mask_token_share + random_token_share, substitutes, inputs[chosen])
    inputs[chosen] = np.where(fate < mask_token_share, mask_id, swapped)
    predict[chosen] = True
    return inputs, predict
