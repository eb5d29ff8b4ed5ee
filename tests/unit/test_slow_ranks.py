"""The clock of a step's phases, and which ranks it calls slow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from beit3_dist.parallel import phases as module
from beit3_dist.parallel.phases import PHASES, Phases, probe_s
from beit3_dist.run.guards.speeds import slow_ranks, spread

CPU = torch.device("cpu")


class Clock:
    """One that stands still between its sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_a_phase_inside_another_interrupts_it(clock: Clock) -> None:
    phases = Phases(CPU)
    phases.begin()
    with phases("backward"):
        clock.sleep(2)
        phases.inside("reduce", clock.sleep)(5)
        clock.sleep(3)
    with phases("data"):
        pass
    clock.sleep(7)  # in none
    taken = dict(zip(PHASES, phases.seconds(), strict=True))
    assert taken == {"data": 0, "forward": 0, "backward": 5, "reduce": 5, "optimizer": 0}
    phases.begin()
    assert sum(phases.seconds()) == 0, "every step begins anew"


def test_a_phase_ends_with_an_error(clock: Clock) -> None:
    phases = Phases(CPU)
    phases.begin()
    with pytest.raises(OSError), phases("data"):
        raise OSError
    clock.sleep(1)
    assert sum(phases.seconds()) == 0


USUAL = [0.01, 0.3, 0.6, 0.05, 0.04, 0.002]
"""data, forward, backward, reduce, optimizer, probe."""


def test_ranks_that_others_wait_for_are_slow_not_those_that_wait() -> None:
    waits = [0.01, 0.3, 0.6, 0.45, 0.04, 0.002]
    slow = [0.01, 0.5, 0.8, 0.05, 0.04, 0.002]
    assert slow_ranks([waits, waits, slow, waits]) == [(2, "forward and backward take 1.3 s, the median 0.9")]
    late = [0.4, 0.3, 0.6, 0.05, 0.04, 0.002]
    assert slow_ranks([late, waits, waits]) == [(0, "data takes 0.4 s, the median 0.01")]
    hot = [*waits[:-1], 0.004]
    ((rank, what),) = slow_ranks([waits, hot, waits])
    assert rank == 1 and what == "its device, in products that wait for nobody take 0.004 s, the median 0.002"


def test_small_differences_are_none() -> None:
    """0.02 s of data are twice the median, and nothing of a step of a second."""
    assert slow_ranks([[0.02, *USUAL[1:]], USUAL, USUAL]) == []
    assert slow_ranks([USUAL]) == []
    assert spread([USUAL, [0.03, *USUAL[1:]], USUAL])["data_slowest_s"] == 0.03


def test_the_probe_takes_time() -> None:
    assert probe_s(CPU) > 0
