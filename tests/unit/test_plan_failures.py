"""Simulated runs with failures against what can be computed."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import mean

import pytest

from beit3_dist.plan.failures import Run, best_every, daly_s, expected_s, lived, lives, young_s

RUN = Run(
    steps=20_000, step_s=1.0, devices=10, every=100, pause_s=5, durable_s=0, restart_s=50, requeue_s=20, noticed_s=10,
    failures_per_device_hour=3600 / 2000 / 10,
)  # fmt: skip
"""A failure every 2,000 seconds."""


def test_without_failures() -> None:
    life = lived(replace(RUN, failures_per_device_hour=0), random.Random(0))
    assert life.seconds == 50 + 20_000 + 200 * 5 and life.failures == 0 and life.lost_s == 0
    assert best_every(replace(RUN, failures_per_device_hour=0)) == 20_000


def test_a_run_that_never_ends_is_not_followed_for_ever() -> None:
    """It fails sooner than it saves, or starts; saving more often may still bring it to its end."""
    often = replace(RUN, every=20_000)
    assert expected_s(often, 2) == math.inf and expected_s(replace(often, every=best_every(often, 2)), 2) < math.inf
    assert expected_s(replace(RUN, failures_per_device_hour=1e6), 2) == math.inf


def test_time_adds_up() -> None:
    for life in lives(replace(RUN, durable_s=30), 20):
        assert life.seconds == pytest.approx(RUN.undisturbed_s + life.lost_s + life.paused_s + life.down_s)


def test_expected_time_is_dalys() -> None:
    """Daly (2006), exactly, of a run whose failures never come while it is down: M e^(R/M) (e^((t+p)/M) - 1) n, which
    becomes M (e^((t+p)/M) - 1) + R per failure for a restart that nothing disturbs."""
    from math import exp

    life_s, m = RUN.every * RUN.step_s + RUN.pause_s, RUN.mtbf_s
    down = RUN.noticed_s + RUN.requeue_s + RUN.restart_s
    of_span = (m + down) * (exp(life_s / m) - 1)
    found = mean(life.seconds for life in lives(RUN, 200))
    # Failures while nothing runs add some: a tenth of them at most here, each of a tenth of the time between two.
    assert found == pytest.approx(RUN.restart_s + of_span * RUN.steps / RUN.every, rel=0.01)


def test_the_best_interval_is_near_youngs_and_dalys() -> None:
    assert young_s(RUN) == pytest.approx((2 * 5 * 2000) ** 0.5) and daly_s(RUN) == pytest.approx(young_s(RUN), rel=0.05)
    best = best_every(RUN)
    assert young_s(RUN) / 2 <= best <= young_s(RUN) * 2
    assert expected_s(replace(RUN, every=best)) <= expected_s(replace(RUN, every=best * 8))


def test_a_save_counts_when_it_is_durable() -> None:
    slow = [life.lost_s for life in lives(replace(RUN, durable_s=90), 20)]
    fast = [life.lost_s for life in lives(RUN, 20)]
    assert mean(slow) > mean(fast) * 1.5
