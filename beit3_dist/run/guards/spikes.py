"""Warnings of a loss that jumps."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from statistics import median

from beit3_dist.run.records import from_the_end

SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median distance from the median."""

LEAST = 1e-3
"""The deviation is taken as at least this share of the median, so that a loss which hardly moves causes no warnings."""


class SpikeMonitor:
    """Compares each loss with the median of the last `window` ones, in robust standard deviations.

    A spike hardly moves a median but moves a mean a lot, so a second spike soon after the first is seen as well. The
    only state is the last losses, which metrics.jsonl holds too.
    """

    def __init__(self, window: int, factor: float, losses: Iterable[float] = ()) -> None:
        """`losses`: those of the steps before, the oldest first."""
        self._factor = factor
        self._losses: deque[float] = deque(losses, maxlen=window)

    def check(self, step: int, loss: float) -> str:
        """Takes one more loss; a warning if it lies more than `factor` deviations above the median, else ''."""
        window, warning = list(self._losses), ""
        if len(window) == self._losses.maxlen:
            middle = median(window)
            deviation = max(SIGMA * median(abs(other - middle) for other in window), LEAST * abs(middle))
            ratio = (loss - middle) / deviation
            if ratio > self._factor:
                warning = (
                    f"step {step}: loss {loss:.4g} lies {ratio:.1f} deviations above {middle:.4g}, the median of the "
                    f"last {len(window)} steps (guards.spike_factor={self._factor:g})"
                )
        self._losses.append(loss)
        return warning


def last_losses(metrics: Path, count: int) -> list[float]:
    """The losses of the last `count` steps in metrics.jsonl that were not skipped."""
    if not metrics.exists():
        return []
    records = map(json.loads, from_the_end(metrics))
    losses = list(islice((record["loss"] for record in records if not record.get("skipped")), count))
    return losses[::-1]
