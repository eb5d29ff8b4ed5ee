"""The one hash behind orders, keys and drop path: the first output of splitmix64 (Steele, Lea and Flood 2014) for a
seed, a bijection of 64-bit integers; of Python's integers, arrays and tensors alike."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # tools that only read shards start without torch, which takes seconds to import
    from torch import Tensor

WORD = (1 << 64) - 1
"""Mask of 64 bits."""
GAMMA = 0x9E3779B97F4A7C15
"""Increment of splitmix64: 2^64 divided by the golden ratio."""
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Its two factors."""


def hash64(value: int) -> int:
    """Hash of one integer in [0, 2^64), on the host, so that no device has to be waited for."""
    value = (value + GAMMA) & WORD
    value = ((value ^ (value >> 30)) * FIRST) & WORD
    value = ((value ^ (value >> 27)) * SECOND) & WORD
    return value ^ (value >> 31)


def hash64_array(values: np.ndarray) -> np.ndarray:
    """Hash of each element of a uint64 array."""
    values = values + np.uint64(GAMMA)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(SECOND)
    return values ^ (values >> np.uint64(31))


def hash64_tensor(values: Tensor) -> Tensor:
    """Hash of each element of an int64 tensor, which stands for the uint64 with the same bits."""
    values = values + signed(GAMMA)
    values = (values ^ right_shift(values, 30)) * signed(FIRST)
    values = (values ^ right_shift(values, 27)) * signed(SECOND)
    return values ^ right_shift(values, 31)


def right_shift(values: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def hash_bytes(data: bytes) -> int:
    """An int64 that tells contents apart: equal bytes have equal ones, others another but for 1 in 2^64."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
