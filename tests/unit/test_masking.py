"""Masks have exact counts, come in blocks, and never touch special words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_dist.data.order import Numbers
from beit3_dist.objectives.masking import block_masks, mask_count, mask_words, min_block

WORDS = range(4, 301)
SHARES = {"specials": (0, 1, 2), "mask_id": 301, "words": WORDS}


@given(grid=st.integers(1, 40), shares=st.lists(st.floats(0, 1), min_size=1, max_size=4), seed=st.integers(0, 1 << 32))
@settings(deadline=None)
def test_block_masks_have_the_exact_counts(grid: int, shares: list[float], seed: int) -> None:
    counts = np.array([round(share * grid * grid) for share in shares])
    masks = block_masks(grid, counts, Numbers(range(seed, seed + len(shares)), 1))
    assert masks.shape == (len(shares), grid * grid) and masks.dtype == bool
    assert masks.sum(1).tolist() == counts.tolist()


def plain_block_mask(grid: int, count: int, numbers: list[float], single: list[float]) -> np.ndarray:
    """BEiT's algorithm 1 in its own words, one picture and one attempt at a time."""
    mask, draws = np.zeros((grid, grid), dtype=bool), iter(numbers)
    while (left := count - mask.sum()) > 0:
        smallest, found = min_block(grid, count), False
        for area, aspect, down, right in [[next(draws) for _ in range(4)] for _ in range(10)]:
            area = smallest + area * max(0, left - smallest)
            aspect = 0.3 ** (1 - 2 * aspect)
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            top, start = int(down * (grid - height + 1)), int(right * (grid - width + 1))
            block = np.zeros_like(mask)
            if height <= grid and width <= grid:
                block[top : top + height, start : start + width] = True
            if 0 < (block & ~mask).sum() <= left:
                mask, found = mask | block, True
                break
        if not found:
            break
    for patch in sorted(np.flatnonzero(~mask.ravel()), key=lambda patch: single[patch])[: count - mask.sum()]:
        mask.ravel()[patch] = True
    return mask.ravel()


@pytest.mark.parametrize("grid", [3, 8, 14, 24])
def test_block_masks_are_those_of_the_plain_algorithm(grid: int) -> None:
    """Also: the mask of a picture does not depend on the pictures beside it."""
    counts = np.linspace(0, grid * grid, 40).astype(int)
    numbers = Numbers(range(40), 1)
    drawn, single = numbers(0, 40 * 200), numbers(1 << 32, grid * grid)
    expected = [plain_block_mask(grid, *row) for row in zip(counts, drawn.tolist(), single.tolist(), strict=True)]
    assert (block_masks(grid, counts, numbers) == expected).all()


def test_counts_of_the_recipes() -> None:
    assert mask_count(0.4, 256) == 102 and mask_count(0.4, 196) == 78
    assert mask_count(0.15, 1) == 1 and mask_count(0.5, 7) == 4


def test_smallest_blocks() -> None:
    """BEiT's 16 patches on its grid and on larger ones, in proportion on smaller ones."""
    assert [min_block(grid, 100) for grid in (4, 7, 14, 16, 24)] == [1, 4, 16, 16, 16]
    assert min_block(14, 5) == 5


def test_masks_are_blocks() -> None:
    """Neighbours of a masked patch are masked far more often than the ratio: 0.4 is what single patches would give."""
    masks = block_masks(14, np.full(200, 78), Numbers(range(200), 1)).reshape(-1, 14, 14)
    both = (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    assert both / masks[:, :, :-1].sum() > 0.7
    # Every patch is masked sometimes, the corners least: few blocks reach them.
    assert masks.mean(axis=0).min() > 0.01 and masks.mean(axis=0).max() < 0.8


def test_impossible_count() -> None:
    with pytest.raises(ValueError, match="cannot mask 17 of 16 patches"):
        block_masks(4, np.array([3, 17]), Numbers(range(2), 1))


TEXTS = st.lists(st.lists(st.integers(0, 300), max_size=60), min_size=1, max_size=4)


def padded(texts: list[list[int]]) -> np.ndarray:
    """int64 [N, L], 1 = <pad>."""
    length = max(map(len, texts))
    return np.array([text + [1] * (length - len(text)) for text in texts], dtype=np.int64).reshape(len(texts), length)


@given(texts=TEXTS, ratio=st.floats(0.01, 0.99), seed=st.integers(0, 1 << 32))
@settings(deadline=None)
def test_word_masks_have_the_exact_counts_and_spare_specials(texts: list[list[int]], ratio: float, seed: int) -> None:
    words = padded(texts)
    shares = {"mask_token_share": 0.8, "random_token_share": 0.1, **SHARES}
    inputs, predict = mask_words(words, Numbers(range(seed, seed + len(texts)), 2), ratio=ratio, **shares)
    assert inputs.shape == predict.shape == words.shape and inputs.dtype == np.int64
    ordinary = ~np.isin(words, (0, 1, 2))
    assert predict.sum(1).tolist() == [mask_count(ratio, count) if count else 0 for count in ordinary.sum(1)]
    assert not (predict & ~ordinary).any()
    assert (inputs == words)[~predict].all()
    assert np.isin(inputs[predict], [301, *WORDS, 3]).all()
    # A text alone, without the padding that longer ones beside it bring, is masked alike.
    for row, text in enumerate(texts):
        alone, chosen = mask_words(padded([text]), Numbers([seed + row], 2), ratio=ratio, **shares)
        assert (alone == inputs[row, : len(text)]).all() and (chosen == predict[row, : len(text)]).all()


def test_every_word_is_chosen_as_often() -> None:
    """1,000 of 4,000 texts choose each of 20 words, within five standard deviations (27 x 5)."""
    _, predict = mask_words(
        np.full((4000, 20), 50),
        Numbers(range(4000), 2),
        ratio=0.25,
        mask_token_share=0.8,
        random_token_share=0.1,
        **SHARES,
    )
    assert np.abs(predict.sum(0) - 1000).max() < 137


def test_shares_of_the_three_fates() -> None:
    """80/10/10 over 20,000 masked words, within five standard deviations (0.003 x 5)."""
    words = np.full((400, 100), 50)
    inputs, predict = mask_words(
        words, Numbers(range(400), 2), ratio=0.5, mask_token_share=0.8, random_token_share=0.1, **SHARES
    )
    masked = inputs[predict]
    assert len(masked) == 20_000
    assert (masked == 301).mean() == pytest.approx(0.8, abs=0.015)
    assert (masked == 50).mean() == pytest.approx(0.1 + 0.1 / len(WORDS), abs=0.012)
    random_words = masked[(masked != 301) & (masked != 50)]
    assert set(random_words) <= set(WORDS) and len(set(random_words)) > 280


@pytest.mark.parametrize(("shares", "expected"), [((1.0, 0.0), {301}), ((0.0, 0.0), {50})])
def test_extreme_shares(shares: tuple[float, float], expected: set[int]) -> None:
    inputs, predict = mask_words(
        np.full((1, 30), 50),
        Numbers([2], 2),
        ratio=0.3,
        mask_token_share=shares[0],
        random_token_share=shares[1],
        **SHARES,
    )
    assert set(inputs[predict].tolist()) == expected
    assert predict.sum() == 9


def test_whole_words_are_hidden_or_shown_as_a_whole() -> None:
    """Ids below 100 begin a word; two texts, of which the second begins inside a word."""
    begins = np.arange(400) < 100
    texts = padded([[0, 50, 200, 201, 60, 70, 210, 80, 2], [0, 200, 201, 50, 202, 60, 2]])
    words = [[[1, 2, 3], [4], [5, 6], [7]], [[1, 2], [3, 4], [5]]]
    shares = {"mask_token_share": 0.8, "random_token_share": 0.1, **SHARES}
    seen = set()
    for seed in range(300):
        shown, predict = mask_words(texts, Numbers([seed, seed], 2), ratio=0.5, begins=begins, **shares)
        for row, of_row in enumerate(words):
            hidden = [bool(predict[row, word[0]]) for word in of_row]
            for word, whole in zip(of_row, hidden, strict=True):
                assert predict[row, word].tolist() == [whole] * len(word)
            assert sum(hidden) == 2 == mask_count(0.5, len(of_row))
            seen.add((row, *hidden))
        assert not predict[:, 0].any() and (shown == texts)[~predict].all()
        alone = mask_words(texts[1:, :7], Numbers([seed], 2), ratio=0.5, begins=begins, **shares)[1]
        assert (alone == predict[1:, :7]).all()
    assert len(seen) == 6 + 3  # every choice of two words comes


def test_nothing_is_masked_at_ratio_0() -> None:
    words = np.full((2, 5), 50)
    shown, predict = mask_words(
        words, Numbers([0, 1], 2), ratio=0.0, mask_token_share=1.0, random_token_share=0.0, **SHARES
    )
    assert not predict.any() and (shown == words).all() and mask_count(0.0, 100) == 0
