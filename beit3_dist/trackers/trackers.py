"""All trackers of a run: none of them ends it or makes it wait.

One that cannot begin is a mistake of the user's, found at the start. One that breaks later is said once, and the run
goes on without it. What may be slow or break has a thread of its own, which records reach through a queue; where that
is full, records are left out.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from beit3_dist.opening import blaming, one_line
from beit3_dist.trackers.base import Recorded, Tracker
from beit3_dist.trackers.registry import chosen

WAITING = 10_000
"""Records that wait for a tracker at the most."""
ENDING_S = 60.0
"""Seconds that the run's end waits for what a tracker has still to write."""

Call = Callable[[Tracker], None]

log = logging.getLogger(__name__)


class Beside:
    """A tracker in a thread of its own."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._broken, self._told = tracker, False, False
        self._queue: queue.Queue[Call | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write, name=f"tracker {tracker.name}", daemon=True)
        self._thread.start()

    def __call__(self, call: Call) -> None:
        """Has something written, soon."""
        if self._broken:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            if not self._told:
                self._told = True
                log.warning("the tracker %s is too slow: some of its records are left out", self._tracker.name)

    def _write(self) -> None:
        try:
            while (call := self._queue.get()) is not None:
                call(self._tracker)
            self._tracker.close()
        except Exception as error:  # whatever it is, training is worth more
            self._broken = True
            words = f"{type(error).__name__}: {one_line(error, 500)}"
            log.warning("the tracker %s has failed; the run goes on without it (%s)", self._tracker.name, words)

    def close(self) -> None:
        """Waits a while for what is still to be written."""
        if not self._broken:
            try:
                self._queue.put(None, timeout=ENDING_S)
            except queue.Full:
                pass
            self._thread.join(ENDING_S)
        if self._thread.is_alive():
            log.warning("the tracker %s has not written all in %.0f s: its end is lost", self._tracker.name, ENDING_S)


class Trackers:
    """What the run folder tells its trackers."""

    def __init__(self, names: Sequence[str | dict[str, Any]], run: Recorded) -> None:
        """Raises ValueError for one that cannot begin."""
        self.in_folder: list[Tracker] = []
        self._beside: list[Beside] = []
        for tracker, section in chosen(names):
            if tracker.in_folder:
                self.in_folder.append(tracker(section, run))
                continue
            with blaming(f"the tracker {tracker.name} cannot begin, mend that or leave it out of trackers", Exception):
                self._beside.append(Beside(tracker(section, run)))

    def _all(self, call: Call) -> None:
        for tracker in self.in_folder:
            call(tracker)
        for beside in self._beside:
            beside(call)

    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl (`kind` train) or eval.jsonl (eval)."""
        self._all(lambda tracker: tracker.record(kind, record))

    def text(self, step: int, name: str, text: str) -> None:
        """A text of after `step`."""
        self._all(lambda tracker: tracker.text(step, name, text))

    def image(self, step: int, name: str, image: Tensor) -> None:
        """An image of after `step`, uint8 [3, H, W]."""
        self._all(lambda tracker: tracker.image(step, name, image))

    def close(self) -> None:
        """Ends all records."""
        for tracker in self.in_folder:
            tracker.close()
        for beside in self._beside:
            beside.close()
