"""What a run reports: metrics.jsonl, eval.jsonl, its trackers and a progress line."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch

from beit3_dist.opening import naming
from beit3_dist.terminal import Unfailing
from beit3_dist.trackers.trackers import Trackers

PROGRESS = {
    "lr": "lr {:.1e}",
    "grad_norm": "grad norm {:.3g}",
    "samples_per_s": "{:.0f} samples/s",
    "memory_gb": "{:.1f} GB",
}
"""Fields of a record that the progress line shows behind the losses, and how."""
_CLEAR = "\r\x1b[K"
"""Takes a terminal back to the beginning of its line, and clears that."""
READ_AT_ONCE = 1 << 20
"""Bytes of a file that are read at a time from its end."""
IN_ORDER = 1000
"""After so many records in a row that stay, all before them stay. Steps ascend, but in files of former versions not
strictly: each process wrote its faults by itself, a little later or earlier."""


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as JSON can hold it: a number that is not finite becomes null, and `non_finite` names its fields."""
    bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    clean = {k: None if k in bad else v for k, v in record.items()}
    return clean | {"non_finite": bad} if bad else clean


class JsonLines:
    """An append-only file of one JSON object a line, written by one process."""

    def __init__(self, path: Path, last_step: int | None) -> None:
        """Keeps the records up to `last_step` (None: all); a later tail, of a run that was killed, is moved aside."""
        if last_step is not None and path.exists():
            _cut_back(path, last_step)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record. Raises OSError, with the file's name, where the disk is full."""
        line = (json.dumps(finite(record)) + "\n").encode()
        with naming(self._path):
            while line:  # what is left of the space takes a part of it, and then comes the error
                line = line[os.write(self._file, line) :]

    def sync(self) -> None:
        """Returns when what has been written is on the disk."""
        with naming(self._path):
            os.fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def from_the_end(path: Path) -> Iterator[bytes]:
    """The lines of a file, with their line ends, from the last one to the first, read in blocks on demand."""
    with open(path, "rb") as file:
        start, first = file.seek(0, os.SEEK_END), b""
        while start > 0:
            size = min(READ_AT_ONCE, start)
            start -= size
            file.seek(start)
            first, *lines = io.BytesIO(file.read(size) + first).readlines()
            yield from reversed(lines)
    if first:
        yield first


def aside(path: Path) -> Path:
    """The name under which a file, or part of it, is kept that belongs to steps before which the run has gone back."""
    return path.with_name(f"{path.stem}.tail-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{path.suffix}")


def _cut_back(path: Path, last_step: int) -> None:
    """Moves the records after `last_step`, and lines that are not whole, out of the end of a file."""
    tail: list[bytes] = []
    in_order = 0
    for line in from_the_end(path):
        tail.append(line)
        in_order = in_order + 1 if _step_of(line) <= last_step else 0
        if in_order == IN_ORDER:
            break
    tail.reverse()
    later = [_step_of(line) > last_step for line in tail]
    if not any(later):
        return
    aside(path).write_bytes(b"".join(line for line, moves in zip(tail, later, strict=True) if moves))
    first = later.index(True)
    with open(path, "r+b") as file:
        file.seek(-sum(map(len, tail[first:])), os.SEEK_END)
        file.write(b"".join(line for line, moves in zip(tail[first:], later[first:], strict=True) if not moves))
        file.truncate()


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a crash has cut short belongs to the tail


def _is_loss(name: str) -> bool:
    """Whether a field is a loss of its own, and no data set's share of one, for which a line has no room."""
    return name.startswith("loss_") and "." not in name


RECENT = 50
"""Steps whose median time predicts how long the remaining ones take."""
FEWEST = 3
"""Nothing is predicted from fewer."""


class Reporter:
    """Writes the records of the first rank's run folder and keeps the person at the terminal informed."""

    def __init__(
        self, out: Path, first_step: int, steps: int, trackers: Trackers, terminal: TextIO | None = None
    ) -> None:
        """`terminal`: where the person looks; None: standard output."""
        self._metrics = JsonLines(out / "metrics.jsonl", first_step)
        self._evaluations = JsonLines(out / "eval.jsonl", first_step)
        self._trackers = trackers
        self._steps, self._terminal = steps, Unfailing(terminal or sys.stdout)
        self._last_line = self._last_step = -math.inf
        self._seconds: deque[float] = deque(maxlen=RECENT)
        """Time of each of the last steps, from end to end, but for the first, which waits for much that comes once."""

    def step(self, record: Mapping[str, Any]) -> None:
        self._metrics.write(record)
        self._trackers.record("train", record)
        self._progress(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        self._evaluations.write(record)
        self._trackers.record("eval", record)
        losses = [f"{name[5:]} {value:.3f}" for name, value in record.items() if _is_loss(name)]
        others = [f"{n} {v:.3f}" for n, v in record.items() if n != "step" and not n.startswith(("loss_", "acc_"))]
        parts = f" ({'  '.join(losses)})" if losses else ""
        self.say(f"held-out after step {record['step']}: {'  '.join(others)}{parts}")

    def times(self, record: Mapping[str, float]) -> None:
        """What a step's time went to, for the trackers."""
        self._trackers.record("times", record)

    def image(self, step: int, name: str, image: torch.Tensor) -> None:
        """An image, uint8 [3, H, W], for the trackers."""
        self._trackers.image(step, name, image)

    def text(self, step: int, name: str, text: str) -> None:
        """A text for the trackers."""
        self._trackers.text(step, name, text)

    def say(self, message: str) -> None:
        """A line of its own for the person at the terminal."""
        self._print(f"{_CLEAR if self._terminal.isatty() else ''}{message}\n")

    def sync(self) -> None:
        self._metrics.sync()
        self._evaluations.sync()

    def close(self) -> None:
        """Flushes everything and ends the progress line."""
        self._trackers.close()
        if self._terminal.isatty():
            self._print("\n")

    def _print(self, text: str) -> None:
        self._terminal.write(text)
        self._terminal.flush()

    def _progress(self, record: Mapping[str, Any]) -> None:
        """On a terminal one line that renews itself, without the parts of the loss where they do not fit; in a file a
        line every ten seconds, and the last step's."""
        now, done = time.monotonic(), record["step"]
        is_terminal, is_last = self._terminal.isatty(), done == self._steps
        if self._last_step > -math.inf:
            self._seconds.append(now - self._last_step)
        self._last_step = now
        if now - self._last_line < (0.2 if is_terminal else 10) and not is_last:
            return
        self._last_line = now
        parts = "  ".join(f"{name[5:]} {value:.3f}" for name, value in record.items() if _is_loss(name))
        step = f"step {done}/{self._steps}  loss {record['loss']:.3f}"
        rest = [form.format(record[name]) for name, form in PROGRESS.items() if name in record]
        if len(self._seconds) >= FEWEST:
            seconds = median(self._seconds) * (self._steps - done)
            rest.append(f"{timedelta(seconds=int(seconds))} left")
        short = "  ".join([step, *rest])
        line = "  ".join([step, f"({parts})", *rest]) if parts else short
        if is_terminal:
            width = self._terminal.columns() - 1
            self._print(f"{_CLEAR}{short if len(short) <= width < len(line) else line[:width]}")
        else:
            self._print(f"{line}\n")
