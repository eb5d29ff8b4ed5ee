"""The hash in its three forms against the published splitmix64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_dist.hashing import WORD, hash64, hash64_array, hash64_tensor, right_shift, signed

WORDS = st.integers(0, WORD)


def plain(x: int) -> int:
    """The published finaliser."""
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def test_first_outputs_of_splitmix64() -> None:
    """For seeds 0 and 1234567, from its published reference."""
    assert [hash64(seed) for seed in (0, 1234567)] == [0xE220A8397B1DCDAF, 6457827717110365317]


@given(st.lists(WORDS, min_size=1, max_size=20))
@settings(deadline=None)
def test_all_forms_are_one(words: list[int]) -> None:
    expected = [plain(word) for word in words]
    assert [hash64(word) for word in words] == expected
    assert hash64_array(np.array(words, dtype=np.uint64)).tolist() == expected
    hashed = hash64_tensor(torch.tensor([signed(word) for word in words]))
    assert hashed.tolist() == [signed(word) for word in expected]


@given(WORDS, st.integers(1, 63))
@settings(deadline=None)
def test_bits_of_signed_words(word: int, bits: int) -> None:
    assert -(1 << 63) <= signed(word) < 1 << 63 and signed(word) & WORD == word
    assert right_shift(torch.tensor(signed(word)), bits).item() == word >> bits
