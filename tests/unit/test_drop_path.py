"""Stochastic depth: the right shares, and a function of (seed, step, sample, layer, branch) alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit3_dist.hashing import WORD, hash64
from beit3_dist.model.drop_path import drop_path_factors

LAYERS = 5
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def factor(sample: int, *, seed: int, step: int, layer: int, branch: int, layers: int, rate: float) -> float:
    """One factor by the definition."""
    key = hash64(hash64(seed & WORD) ^ step)
    bits = hash64(hash64((sample & WORD) ^ key) ^ (2 * layer + branch))
    p = rate * layer / (layers - 1)
    return 0.0 if (bits >> 40) / 2**24 < p else 1 / (1 - p)


def factors(samples: torch.Tensor, **changes: float) -> torch.Tensor:
    return drop_path_factors(samples, **{"seed": 1, "step": 2, "layers": LAYERS, "rate": 0.4} | changes)


@given(samples=st.lists(INT64, min_size=1, max_size=6), seed=st.integers(0, 1 << 62), step=st.integers(0, 10**7))
@settings(deadline=None, max_examples=30)
def test_factors_equal_pure_python(samples: list[int], seed: int, step: int) -> None:
    ours = factors(torch.tensor(samples), seed=seed, step=step)
    plain = [
        [
            [factor(s, seed=seed, step=step, layer=layer, branch=b, layers=LAYERS, rate=0.4) for s in samples]
            for b in (0, 1)
        ]
        for layer in range(LAYERS)
    ]
    torch.testing.assert_close(ours, torch.tensor(plain), rtol=1e-6, atol=0)  # p is rounded to float32


SAMPLES = 20_000


def test_shares_and_means() -> None:
    """p is linear in depth; the zero shares lie within five standard deviations of it, so that a right hash fails
    once in a million times; the mean follows: (1 - share) / (1 - p)."""
    kept = factors(torch.arange(SAMPLES))
    for layer in range(LAYERS):
        p = 0.4 * layer / (LAYERS - 1)
        bound = 5 * math.sqrt(p * (1 - p) / SAMPLES)
        for branch in (0, 1):
            share = (kept[layer, branch] == 0).float().mean().item()
            assert abs(share - p) <= bound, f"layer {layer}, branch {branch}: {share} instead of {p}"
            assert abs(kept[layer, branch].mean().item() - 1) <= bound / (1 - p) + 1e-6
            assert kept[layer, branch].unique().tolist() == pytest.approx([0, 1 / (1 - p)] if layer else [1])


def test_rate_zero_keeps_everything() -> None:
    assert torch.equal(factors(torch.arange(50), rate=0.0), torch.ones(LAYERS, 2, 50))


def test_a_sample_keeps_its_factors_wherever_it_stands() -> None:
    samples = torch.randint(-(2**62), 2**62, (200,), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    whole = factors(samples)
    assert torch.equal(factors(samples[order]), whole[..., order])
    assert torch.equal(torch.cat([factors(samples[:77]), factors(samples[77:])], dim=-1), whole)


class Devices(TorchDispatchMode):
    """Notes the devices of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        self.seen |= {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


def test_the_host_does_not_wait_for_the_device() -> None:
    """After the first step nothing is copied to the device, here one without content: all is made there."""
    samples = torch.zeros(3, dtype=torch.int64, device="meta")
    factors(samples)
    with Devices() as devices:
        assert factors(samples, step=7).device.type == "meta"
    assert devices.seen == {"meta"}


def test_every_part_of_the_key_counts() -> None:
    """Draws that differ in one part agree no more often than independent ones: p^2 + (1-p)^2 = 0.52 at the last
    layer, within five standard deviations."""
    samples = torch.arange(SAMPLES)
    last = factors(samples)[-1]
    same = lambda a, b: ((a == 0) == (b == 0)).float().mean().item()  # noqa: E731
    bound = 5 * math.sqrt(0.52 * 0.48 / SAMPLES)
    constant = factors(samples, layers=2, rate=0.4)  # its last layer has p = 0.4 too, at another depth
    for what, a, b in (
        ("branch", last[0], last[1]),
        ("step", last[0], factors(samples, step=3)[-1, 0]),
        ("seed", last[0], factors(samples, seed=2)[-1, 0]),
        ("layer", last[0], constant[-1, 0]),
        ("sample", last[0], last[0].roll(1)),
        ("swapped seed and step", last[0], factors(samples, seed=2, step=1)[-1, 0]),
    ):
        assert abs(same(a, b) - 0.52) <= bound, what
