"""Stochastic depth without a generator: a counter-based hash decides, so every layout, recompute and resume agrees."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WORD = (1 << 64) - 1
"""64 bits."""


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def hash64(x: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea and Flood 2014), elementwise on int64."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _hash64(x: int) -> int:
    """`hash64` of one number, 0 <= x < 2^64, in Python's integers: no device is asked, so that none is waited for."""
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


@cache
def _probabilities(rate: float, layers: int, device: torch.device) -> Tensor:
    """float32 [layers, 1, 1]: computed on the CPU, since each device rounds in its own way, and copied once, since the
    host waits for a copy."""
    return torch.linspace(0, rate, layers, device="cpu").view(layers, 1, 1).to(device)


def drop_path_factors(sample_ids: Tensor, *, seed: int, step: int, layers: int, rate: float) -> Tensor:
    """Factors of the residual branches, float32 [layers, 2, S]: 0 with probability p, else 1 / (1 - p).

    p grows linearly from 0 at the first layer to `rate` at the last (`rate` = 0 gives ones). The draw is a function of
    (seed, step, sample id, layer, branch) alone. `sample_ids`: int64 [S].
    """
    device = sample_ids.device
    key = _signed(_hash64(_hash64(seed & WORD) ^ step))
    branches = torch.arange(layers * 2, device=device).view(layers, 2, 1)
    bits = hash64(hash64(sample_ids ^ key) ^ branches)
    uniform = _shift(bits, 40).float() / (1 << 24)  # 24 bits: exact in float32, in [0, 1)
    p = _probabilities(rate, layers, device)
    return (uniform >= p).float() / (1 - p)
