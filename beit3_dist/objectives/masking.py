"""Which patches and words are hidden: block-wise masks for pictures, BERT's 80/10/10 for words.

All counts are exact, so that the work of a step and the weight of a sample do not fluctuate. The masks of a micro-batch
are drawn together: one at a time, each would take as long as reading its sample. `Numbers` are passed in; the mask of a
sample depends on its own numbers alone, and not on the samples beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

MIN_BLOCK_SHARE = 16 / 196
"""BEiT's smallest block, 16 patches, as a share of its 14 x 14 grid: smaller grids get smaller blocks."""
MIN_ASPECT = 0.3
"""A block's height over its width lies in [0.3, 1 / 0.3]."""
ATTEMPTS = 10
"""Blocks that are tried before the rest is filled with single patches."""
SINGLE = 1 << 32
"""First of the numbers for single patches, far behind those for blocks."""

Numbers = Callable[[int, int], np.ndarray]
"""(first, count) -> float64 [N, count]: numbers first, first + 1, ... of each of N samples, uniform in [0, 1)."""


def mask_count(ratio: float, n: int) -> int:
    """How many of n patches or words are masked: at least one, unless none are to be."""
    return max(1, round(ratio * n)) if ratio else 0


def min_block(grid: int, count: int) -> int:
    """Smallest block in patches: 16 from a 14 x 14 grid on, in proportion below, never more than is to be masked."""
    return max(1, min(16, round(MIN_BLOCK_SHARE * grid * grid), count))


def block_masks(grid: int, counts: np.ndarray, numbers: Numbers) -> np.ndarray:
    """Exactly `counts` [N] masked patches in rectangular blocks (BEiT, algorithm 1) -> bool [N, grid * grid].

    Each picture gets blocks until none of ten fits into what is left to mask; single patches then fill up to the count.
    """
    if len(wrong := counts[(counts < 0) | (counts > grid * grid)]):
        raise ValueError(f"cannot mask {wrong[0]} of {grid * grid} patches")
    masks, left = np.zeros((len(counts), grid, grid), dtype=bool), counts.copy()
    smallest = np.array([min_block(grid, count) for count in counts])
    growing = np.flatnonzero(left)
    for block in itertools.count():
        if not len(growing):
            break
        drawn = numbers(block * 4 * ATTEMPTS, 4 * ATTEMPTS)[growing]
        rows, columns = _blocks(grid, smallest[growing], left[growing], drawn)
        free = ~masks[growing]
        new = ((rows.astype(np.float32) @ free) * columns).sum(2)  # [growing, attempts] patches not masked before
        fits = (0 < new) & (new <= left[growing, None])
        found = np.flatnonzero(fits.any(1))
        attempt, growing = fits[found].argmax(1), growing[found]
        masks[growing] |= rows[found, attempt, :, None] & columns[found, attempt, None, :]
        left[growing] -= new[found, attempt].astype(left.dtype)
        growing = growing[left[growing] > 0]
    flat = masks.reshape(len(counts), grid * grid)
    return flat | _least(numbers(SINGLE, grid * grid) + flat, left)


def _blocks(grid: int, smallest: np.ndarray, left: np.ndarray, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns of N x ATTEMPTS random blocks, bool [N, ATTEMPTS, grid] each.

    `smallest`, `left`: limits of a block's area, [N]; `drawn`: four numbers an attempt, [N, 4 * ATTEMPTS]. A block that
    does not fit into the grid has no patch.
    """
    area, aspect, down, right = np.moveaxis(drawn.reshape(-1, ATTEMPTS, 4), 2, 0)
    side = np.sqrt(smallest[:, None] + area * np.maximum(0, left - smallest)[:, None])
    stretch = MIN_ASPECT ** (0.5 - aspect)  # root of height over width
    height, width = np.rint(side * stretch), np.rint(side / stretch)
    height[(height > grid) | (width > grid)] = 0

    def cells(length: np.ndarray, place: np.ndarray) -> np.ndarray:
        start = np.floor(place * (grid - length + 1))[:, :, None]
        return (start <= np.arange(grid)) & (np.arange(grid) < start + length[:, :, None])

    return cells(height, down), cells(width, right)


def _least(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The places of each row's `counts` least scores, bool like `scores` [N, L]."""
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, scores.argsort(1), np.arange(scores.shape[1]) < counts[:, None], 1)
    return chosen


def _heads(ids: np.ndarray, ordinary: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """bool like `ids` [N, L]: the first pieces of the words among the `ordinary` ones."""
    after_special = np.ones(ids.shape, dtype=bool)
    after_special[:, 1:] = ~ordinary[:, :-1]
    return ordinary & (begins[ids] | after_special)


def mask_words(
    ids: np.ndarray,
    numbers: Numbers,
    *,
    ratio: float,
    specials: tuple[int, ...],
    mask_id: int,
    words: range,
    mask_token_share: float,
    random_token_share: float,
    begins: np.ndarray | None = None,
    count: Callable[[float, int], int] = mask_count,
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses the words to predict in each text and hides them -> (inputs int64 [N, L], predict bool [N, L]).

    Of each text in `ids` [N, L], `count(ratio, words of the text)` words are chosen; `specials` (<s>, </s>, <pad>)
    are neither counted nor chosen. Each chosen word becomes `mask_id` with probability `mask_token_share`, one of
    `words` with probability `random_token_share`, and else stays. A text without words has nothing to predict.

    With `begins`, bool [vocabulary], whether a piece begins a word, whole words are counted and chosen, and the pieces
    of a chosen one hidden each by itself; a text that begins inside a word has its rest as one.
    """
    ordinary = np.ones(ids.shape, dtype=bool)
    for special in specials:
        ordinary &= ids != special
    heads = ordinary if begins is None else _heads(ids, ordinary, begins)
    score, fate, substitute = np.moveaxis(numbers(0, 3 * ids.shape[1]).reshape(*ids.shape, 3), 2, 0)
    counts = np.array([count(ratio, length) if length else 0 for length in heads.sum(1).tolist()], dtype=np.int64)
    predict = _least(score + ~heads, counts)
    if begins is not None:  # each piece shares the lot of its word's first
        first = np.maximum.accumulate(np.where(heads, np.arange(ids.shape[1]), 0), axis=1)
        predict = np.take_along_axis(predict, first, 1) & ordinary
    substitutes = words.start + (substitute * len(words)).astype(np.int64)
    swapped = np.where(fate < mask_token_share + random_token_share, substitutes, ids)
    hidden = np.where(fate < mask_token_share, mask_id, swapped)
    return np.where(predict, hidden, ids), predict
