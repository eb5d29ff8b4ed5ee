"""What the ranks agree on about a step's samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from beit3_dist.data.batch import MicroBatch
from beit3_dist.parallel.mesh import Groups
from beit3_dist.train import feed
from beit3_dist.train.feed import Feed
from tests.parallel.workers import run_workers

READING_S = [0.25, 9.0, 1.5, 9.0]
"""By rank; ranks 1 and 3 are tensor neighbours that get the samples from ranks 0 and 2."""


def wait_of_a_step(groups: Groups) -> float:
    """The step's wait where each rank takes `READING_S` of a clock that stands still otherwise, though the first rank
    comes to the collective long after the others."""
    now = [1000.0 * (groups.mesh.rank == 0)]

    def read() -> list[MicroBatch]:
        now[0] += READING_S[groups.mesh.rank]
        return []

    # All that is needed where there are no samples.
    config: Any = SimpleNamespace(batch=SimpleNamespace(accumulation=0))
    objectives: Any = SimpleNamespace(losses=[])
    with patch.object(feed, "time", SimpleNamespace(perf_counter=lambda: now[0])):
        return Feed(config, objectives, groups).step(read).data_wait_s


@pytest.mark.parametrize(("tensor", "expected"), [(1, [9.0] * 4), (2, [1.5] * 4)])
def test_the_wait_of_a_step_is_that_of_its_slowest_reader(tensor: int, expected: list[float]) -> None:
    assert run_workers(4, wait_of_a_step, tensor=tensor) == expected
