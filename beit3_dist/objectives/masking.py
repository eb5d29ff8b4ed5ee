"""Which patches and words are hidden: block-wise masks for pictures, BERT's 80/10/10 for words.

All counts are exact, so that the work of a step and the weight of a sample do not fluctuate. All draws come from the
generator that is passed in.
"""

from __future__ import annotations

import math

import numpy as np

MIN_BLOCK_SHARE = 16 / 196
"""BEiT's smallest block, 16 patches, as a share of its 14 x 14 grid: smaller grids get smaller blocks."""
MIN_ASPECT = 0.3
"""A block's height over its width lies in [0.3, 1 / 0.3]."""
ATTEMPTS = 10
"""Blocks that are tried before the rest is filled with single patches."""


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
    mask = np.zeros((grid, grid), dtype=bool)
    left = count
    while left:
        added = _add_block(mask, min_block(grid, count), left, rng)
        if not added:
            break
        left -= added
    flat = mask.reshape(-1)
    flat[rng.choice(np.flatnonzero(~flat), size=left, replace=False)] = True
    return flat


def _add_block(mask: np.ndarray, smallest: int, left: int, rng: np.random.Generator) -> int:
    """Masks one more block in place; returns the number of newly masked patches, 0 if no block was found."""
    grid = len(mask)
    # All attempts are drawn at once: a call of the generator costs as much as the rest of an attempt.
    for size, shape, down, right in rng.random((ATTEMPTS, 4)).tolist():
        area = smallest + size * max(0, left - smallest)
        aspect = MIN_ASPECT ** (1 - 2 * shape)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height <= grid and 0 < width <= grid):
            continue
        top, start = int(down * (grid - height + 1)), int(right * (grid - width + 1))
        block = mask[top : top + height, start : start + width]
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= left:
            block[...] = True
            return new
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
    chosen = rng.choice(candidates, size=mask_count(ratio, len(candidates)), replace=False)
    fate = rng.random(len(chosen))
    substitutes = rng.integers(words.start, words.stop, size=len(chosen))
    predict[chosen] = True
    hidden = fate < mask_token_share
    swapped = ~hidden & (fate < mask_token_share + random_token_share)
    inputs[chosen[hidden]] = mask_id
    inputs[chosen[swapped]] = substitutes[swapped]
    return inputs, predict
