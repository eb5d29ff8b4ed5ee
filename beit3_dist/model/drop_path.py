"""Stochastic depth without a generator: a counter-based hash decides, so every layout, recompute and resume agrees."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from beit3_dist.hashing import WORD, hash64, hash64_tensor, right_shift, signed


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
    key = signed(hash64(hash64(seed & WORD) ^ step))
    branches = torch.arange(layers * 2, device=device).view(layers, 2, 1)
    bits = hash64_tensor(hash64_tensor(sample_ids ^ key) ^ branches)
    uniform = right_shift(bits, 40).float() / (1 << 24)  # 24 bits: exact in float32, in [0, 1)
    p = _probabilities(rate, layers, device)
    return (uniform >= p).float() / (1 - p)
