"""The learning rate at the corners, by hand."""

from __future__ import annotations

import math

import pytest

from beit3_dist.config import OptimConfig
from beit3_dist.train.schedule import learning_rate

CONFIG = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=10)
STEPS = 110


def test_warm_up_is_a_line_that_reaches_the_peak() -> None:
    rates = [learning_rate(step, STEPS, CONFIG) for step in range(10)]
    assert rates == pytest.approx([1e-4 * n for n in range(1, 11)])


def test_cosine_from_the_peak_to_the_floor() -> None:
    assert learning_rate(10, STEPS, CONFIG) == 1e-3
    assert learning_rate(60, STEPS, CONFIG) == pytest.approx((1e-3 + 1e-5) / 2)  # halfway down
    assert learning_rate(35, STEPS, CONFIG) == pytest.approx(1e-5 + 0.99e-3 * (1 + math.sqrt(0.5)) / 2)
    rates = [learning_rate(step, STEPS, CONFIG) for step in range(10, STEPS)]
    assert rates == sorted(rates, reverse=True)
    # The floor would be reached one step after the last: its rate lies above it by a cosine's last step.
    assert 1e-5 < rates[-1] < 1e-5 + 1e-3 * (math.pi / 100) ** 2


def test_line_from_the_peak_to_the_floor() -> None:
    config = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=10, decay="linear")
    assert [learning_rate(step, STEPS, config) for step in (9, 10, 35, 60)] == pytest.approx(
        [1e-3, 1e-3, 1e-5 + 0.99e-3 * 0.75, 1e-5 + 0.99e-3 * 0.5]
    )


def test_constant() -> None:
    config = OptimConfig(lr=1e-3, warmup_steps=10, decay="constant")
    assert [learning_rate(step, STEPS, config) for step in (4, 9, 10, STEPS - 1)] == [5e-4, 1e-3, 1e-3, 1e-3]


def test_inverse_square_root() -> None:
    config = OptimConfig(lr=1e-3, min_lr=2e-4, warmup_steps=10, decay="inverse_sqrt")
    rates = [learning_rate(step, STEPS, config) for step in (9, 10, 40, 90)]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 1e-3 / 3])
    assert learning_rate(10_000, 20_000, config) == 2e-4 and learning_rate(40, 10**6, config) == rates[2]
    assert learning_rate(0, 5, OptimConfig(lr=1.0, warmup_steps=0, decay="inverse_sqrt")) == 1.0


def test_warm_up_then_the_peak_then_down() -> None:
    config = OptimConfig(lr=1e-3, min_lr=0, warmup_steps=10, decay="warmup_stable_decay", decay_share=0.2)
    assert {learning_rate(step, 100, config) for step in range(9, 81)} == {1e-3}
    assert [learning_rate(step, 100, config) for step in (85, 99)] == pytest.approx(
        [1e-3 * 0.5, 1e-3 * (1 - math.sqrt(0.95))]
    )
    longer = [learning_rate(step, 200, config) for step in range(81)]
    assert longer == [learning_rate(step, 100, config) for step in range(81)], "more steps change nothing before"
    whole = OptimConfig(lr=1.0, min_lr=0, warmup_steps=10, decay="warmup_stable_decay", decay_share=1.0)
    assert learning_rate(10, 100, whole) == 1.0 > learning_rate(11, 100, whole)
    with pytest.raises(ValueError, match=r"optim.decay_share=0 is not in \(0, 1\]"):
        OptimConfig(decay_share=0)


def test_without_warm_up() -> None:
    assert learning_rate(0, 5, OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=0)) == 1.0


def test_warm_up_to_the_end() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=4)
    assert [learning_rate(step, 4, config) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_papers_schedule() -> None:
    config = OptimConfig()
    assert learning_rate(0, 1_000_000, config) == pytest.approx(1e-7)
    assert learning_rate(9_999, 1_000_000, config) == learning_rate(10_000, 1_000_000, config) == 1e-3
    assert learning_rate(999_999, 1_000_000, config) == pytest.approx(1e-5, rel=1e-6)
