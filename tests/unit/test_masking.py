"""Masks have exact counts, come in blocks, and never touch special words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_dist.objectives.masking import block_mask, mask_count, mask_words, min_block

WORDS = range(4, 301)
SHARES = {"specials": (0, 1, 2), "mask_id": 301, "words": WORDS}


@given(grid=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 1 << 32))
@settings(deadline=None)
def test_block_masks_have_the_exact_count(grid: int, share: float, seed: int) -> None:
    count = round(share * grid * grid)
    mask = block_mask(grid, count, np.random.default_rng(seed))
    assert mask.shape == (grid * grid,) and mask.dtype == bool
    assert mask.sum() == count


def test_counts_of_the_recipes() -> None:
    assert mask_count(0.4, 256) == 102 and mask_count(0.4, 196) == 78
    assert mask_count(0.15, 1) == 1 and mask_count(0.5, 7) == 4


def test_smallest_blocks() -> None:
    """BEiT's 16 patches on its grid and on larger ones, in proportion on smaller ones."""
    assert [min_block(grid, 100) for grid in (4, 7, 14, 16, 24)] == [1, 4, 16, 16, 16]
    assert min_block(14, 5) == 5


def test_masks_are_blocks() -> None:
    """Neighbours of a masked patch are masked far more often than the ratio: 0.4 is what single patches would give."""
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask(14, 78, rng).reshape(14, 14) for _ in range(200)])
    both = (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    assert both / masks[:, :, :-1].sum() > 0.7
    # Every patch is masked sometimes, the corners least: few blocks reach them.
    assert masks.mean(axis=0).min() > 0.01 and masks.mean(axis=0).max() < 0.8


def test_impossible_count() -> None:
    with pytest.raises(ValueError, match="cannot mask 17 of 16 patches"):
        block_mask(4, 17, np.random.default_rng(0))


@given(ids=st.lists(st.integers(0, 300), max_size=60), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 1 << 32))
@settings(deadline=None)
def test_word_masks_have_the_exact_count_and_spare_specials(ids: list[int], ratio: float, seed: int) -> None:
    words = np.array(ids, dtype=np.int64)
    inputs, predict = mask_words(
        words, np.random.default_rng(seed), ratio=ratio, mask_token_share=0.8, random_token_share=0.1, **SHARES
    )
    ordinary = ~np.isin(words, (0, 1, 2))
    assert predict.sum() == (mask_count(ratio, ordinary.sum()) if ordinary.any() else 0)
    assert not (predict & ~ordinary).any()
    assert (inputs == words)[~predict].all()
    assert np.isin(inputs[predict], [301, *WORDS, 3]).all()


def test_shares_of_the_three_fates() -> None:
    """80/10/10 over 20,000 masked words, within five standard deviations (0.003 x 5)."""
    words = np.full(40_000, 50)
    inputs, predict = mask_words(
        words, np.random.default_rng(1), ratio=0.5, mask_token_share=0.8, random_token_share=0.1, **SHARES
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
        np.full(30, 50),
        np.random.default_rng(2),
        ratio=0.3,
        mask_token_share=shares[0],
        random_token_share=shares[1],
        **SHARES,
    )
    assert set(inputs[predict].tolist()) == expected
    assert predict.sum() == 9
