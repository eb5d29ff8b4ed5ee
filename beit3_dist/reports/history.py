"""The records of a run of any length in bounded memory: thinned out while they are read, followed while it goes on."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from beit3_dist.opening import open_regular, regular_size

BUCKETS = 400
"""Points of a curve at the least, once there are so many steps; twice as many at the most."""
MOST_STEPS = 1 << 53
"""Of a run; float64 counts no further."""
AT_ONCE = 4096
"""Records that are added at a time."""
DIGITS = 5
"""Significant digits of a point."""
RECENT = 20
"""Records whose mean is told as the last value."""
MARK = 64
"""Last bytes of what was read by which a file is known again that a run has cut back meanwhile."""


class Followed:
    """A JSON-lines file that another process appends to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._end, self._lines, self._mark = 0, 0, b""

    def cut_back(self) -> bool:
        """Whether what was read is no longer there: a run has gone back to a former step. All is read anew then."""
        if not self._end:
            return False
        if self.path.is_file() and regular_size(self.path) >= self._end:
            with open_regular(self.path) as file:
                file.seek(self._end - len(self._mark))
                if file.read(len(self._mark)) == self._mark:
                    return False
        self._end, self._lines, self._mark = 0, 0, b""
        return True

    def new(self) -> Iterator[dict[str, Any]]:
        """The records since the last call. A last line that is not whole is left for later. Raises ValueError for one
        that is no record."""
        if not self.path.is_file():
            return
        with open_regular(self.path) as file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line)
                    fits = 0 <= int(record["step"]) < MOST_STEPS
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    fits = False
                if not fits:
                    raise ValueError(f"{self.path}: line {self._lines + 1} is not a record of a step")
                self._lines += 1
                self._end, self._mark = self._end + len(line), (self._mark + line)[-MARK:]
                yield record


class History:
    """The numbers of records over their steps, each a mean over as many steps as keep them few.

    Bucket b holds the steps b * width + 1 to (b + 1) * width; where there are too many, neighbours become one.
    """

    def __init__(self) -> None:
        self.width = 1
        self.first: dict[str, Any] = {}
        """The first record."""
        self.last: dict[str, Any] = {}
        """The last one."""
        self.records = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._fields: dict[str, np.ndarray] = {}
        """Field -> float64 [4, 2 * BUCKETS]: numbers, sum, least and largest of each bucket."""

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """More records, in the order of their steps."""
        records = iter(records)
        while some := list(islice(records, AT_ONCE)):
            self.first = self.first or some[0]
            self.last = some[-1]
            self.records += len(some)
            self._recent.extend(some)
            self._add(some)

    def _add(self, records: Sequence[dict[str, Any]]) -> None:
        steps = np.array([int(record["step"]) for record in records])
        while steps.max() > 2 * BUCKETS * self.width:
            self._halve()
        buckets = np.maximum(steps - 1, 0) // self.width
        for name in dict.fromkeys(name for record in records for name in record):
            values = np.array([_number(record.get(name)) for record in records])
            there = np.isfinite(values)
            if there.any():
                kept = self._fields.setdefault(name, _empty(2 * BUCKETS))
                np.add.at(kept[0], buckets[there], 1)
                np.add.at(kept[1], buckets[there], values[there])
                np.minimum.at(kept[2], buckets[there], values[there])
                np.maximum.at(kept[3], buckets[there], values[there])

    def _halve(self) -> None:
        self.width *= 2
        for name, kept in self._fields.items():
            pairs, halved = kept.reshape(4, BUCKETS, 2), _empty(2 * BUCKETS)
            halved[:2, :BUCKETS] = pairs[:2].sum(2)
            halved[2, :BUCKETS], halved[3, :BUCKETS] = pairs[2].min(1), pairs[3].max(1)
            self._fields[name] = halved

    def total(self, name: str) -> float:
        """The sum over all records."""
        return float(self._fields[name][1].sum()) if name in self._fields else 0.0

    def recent(self) -> dict[str, float | None]:
        """The mean of each number over the last records; null where one of them is not finite."""
        names = [name for name, value in self.last.items() if name != "step" and np.isfinite(_number(value))]
        values = [[_number(record.get(name)) for record in self._recent] for name in names]
        return {name: _rounded(np.mean([some], axis=1))[0] for name, some in zip(names, values, strict=True)}

    def curves(self) -> dict[str, Any]:
        """{"steps": the last step of each bucket that holds any, "fields": {NAME: {"mean", and where buckets hold
        several steps "low" and "high": a number or null for each}}, "hours", "samples": what had passed by then}."""
        if not self._fields:
            return {"steps": [], "hours": [], "samples": [], "width": 1, "fields": {}}
        used = self._fields["step"][0] > 0
        mean = {}
        for name, (number, total, *_) in self._fields.items():
            mean[name] = np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)[used]
        passed = {name: kept[1][used].cumsum() for name, kept in self._fields.items()}
        samples = sum((passed[name] for name in ("images", "texts", "pairs") if name in passed), np.zeros(used.sum()))
        fields = {}
        for name, kept in self._fields.items():
            if name not in ("step", "images", "texts", "pairs"):
                fields[name] = {"mean": _rounded(mean[name])}
                if self.width > 1:
                    fields[name] |= {"low": _rounded(kept[2][used]), "high": _rounded(kept[3][used])}
        if "data_wait_s" in mean and "step_s" in mean:
            fields["data_wait_share"] = {"mean": _rounded(mean["data_wait_s"] / mean["step_s"])}
        return {
            "steps": [int(step) for step in self._fields["step"][3][used]],
            "hours": _rounded(passed.get("step_s", np.zeros(used.sum())) / 3600),
            "samples": [int(count) for count in samples],
            "width": self.width,
            "fields": fields,
        }


def _empty(buckets: int) -> np.ndarray:
    kept = np.zeros((4, buckets))
    kept[2], kept[3] = np.inf, -np.inf
    return kept


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else np.nan


def _rounded(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]
