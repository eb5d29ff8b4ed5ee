"""A real run that is killed at random times, and what the simulation of plan/failures.py says of it.

First the run starts undisturbed until its second checkpoint is whole: how long it takes to its first step, a step's
seconds, what a checkpoint stops it for, and how much later it is on the disk. From these the share of time that trains
is predicted; then the run goes on, is killed with SIGKILL and started again, and its share is counted: steps that are
in its records at the end, each worth an undisturbed one's seconds. An attempt that ends by itself, which nobody
predicts, is told and started again, too, unless several in a row have come to no other step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from beit3_dist.checkpoint.store import checkpoints
from beit3_dist.config import require
from beit3_dist.opening import read_text
from beit3_dist.plan.failures import Run, lives

LOOK_S = 0.05
MOST_BYTES = 100_000_000
MOST_IDLE = 3
"""Attempts that may end by themselves one after the other without a step."""


@dataclass(frozen=True)
class Experiment:
    """How it went."""

    run: Run
    """As it was measured undisturbed; its failures are those of one device."""
    seconds: float
    kills: int
    ends: int
    """Of attempts by themselves."""
    steps: int
    """That were kept."""

    @property
    def measured(self) -> float:
        """Share of the time that trained."""
        return self.steps * self.run.step_s / self.seconds

    @property
    def predicted(self) -> float:
        """The same of simulated runs of this length."""
        return mean(life.share(self.run) for life in lives(self.run, 200))


class _Attempts:
    """A command that is started and killed with all its processes."""

    def __init__(self, command: Sequence[str], out: Path) -> None:
        self._command, self.out = command, out
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = open(self.out.with_suffix(".log"), "ab")  # noqa: SIM115 (the processes hold it)
        self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        if self._process is None:  # the command cannot be started
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def lives(self) -> bool:
        """Whether the command still runs."""
        return self._process is not None and self._process.poll() is None

    def until(self, there: Callable[[], bool]) -> None:
        """Waits. Raises ValueError where the command ends by itself."""
        while not there():
            require(self.lives, self.ended)
            time.sleep(LOOK_S)

    @property
    def ended(self) -> str:
        """What is said of a command that has ended by itself."""
        return f"the run ended by itself: see {self.out.with_suffix('.log')}; its --steps must be many"

    def records(self) -> list[dict[str, float]]:
        """Of the steps that are in the run's folder; a line that is being written is left out."""
        path = self.out / "metrics.jsonl"
        text = read_text(path, MOST_BYTES) if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def saved(self) -> int:
        """Checkpoints that are whole."""
        return len(checkpoints(self.out / "checkpoints"))


def experiment(
    command: Sequence[str], out: Path, seconds: float, mtbf_s: float, every: int, seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Experiment:  # fmt: skip
    """Runs it for so many seconds beside what is measured before. `every`: steps between the run's checkpoints. `tell`
    is given a line for each kill."""
    require(not out.exists(), f"--run {out} is there already: name a folder that is not")
    out.parent.mkdir(parents=True, exist_ok=True)
    attempts = _Attempts(command, out)
    try:
        run = _undisturbed(attempts, every, mtbf_s, seconds)
        before, draw, kills, ends = len(attempts.records()), random.Random(seed), 0, 0
        attempts.kill()
        start, idle, reached = time.monotonic(), 0, before
        due = start + draw.expovariate(1 / mtbf_s)
        attempts.start()
        while (now := time.monotonic()) < start + seconds:
            if now < due and attempts.lives:
                time.sleep(LOOK_S)
                continue
            killed = attempts.lives
            attempts.kill()
            steps = len(attempts.records())
            kills, ends, idle = kills + killed, ends + (not killed), 0 if killed or steps != reached else idle + 1
            require(idle < MOST_IDLE, attempts.ended)
            reached, how = steps, "killed" if killed else "ended by itself"
            tell(f"{now - start:7.1f} s  {how} behind step {steps}, {attempts.saved()} checkpoints are whole")
            if killed:
                due = time.monotonic() + draw.expovariate(1 / mtbf_s)
            attempts.start()
        taken = time.monotonic() - start
    finally:
        attempts.kill()
    return Experiment(run, taken, kills, ends, len(attempts.records()) - before)


def _undisturbed(attempts: _Attempts, every: int, mtbf_s: float, seconds: float) -> Run:
    """What an undisturbed start and its first two checkpoints take."""
    start = time.monotonic()
    attempts.start()
    attempts.until(lambda: bool(attempts.records()))
    first = time.monotonic() - start
    durable = []
    for number in (1, 2):
        attempts.until(lambda number=number: len(attempts.records()) >= number * every)  # type: ignore[misc]
        reached = time.monotonic()
        attempts.until(lambda number=number: attempts.saved() >= number)  # type: ignore[misc]
        durable.append(time.monotonic() - reached)
    taken = {int(record["step"]): record["step_s"] for record in attempts.records()}
    of_step = median(taken.values())
    pauses = [taken[step + late] - of_step for step in (every, 2 * every) for late in (0, 1) if step + late in taken]
    return Run(
        steps=max(every, round(seconds / of_step)), step_s=of_step, devices=1, every=every,
        pause_s=max(0.0, sum(pauses) / 2), durable_s=mean(durable), restart_s=first - of_step, requeue_s=0.0,
        noticed_s=0.0, failures_per_device_hour=3600 / mtbf_s,
    )  # fmt: skip


def lines(found: Experiment) -> list[str]:
    """For people."""
    run = found.run
    return [
        f"undisturbed: {run.step_s:.3f} s a step, {run.restart_s:.1f} s to start, a save every {run.every} steps "
        f"pauses {run.pause_s:.2f} s and counts {run.durable_s:.2f} s later",
        f"{found.kills} kills in {found.seconds:.0f} s{f', {found.ends} ends by itself' if found.ends else ''}: "
        f"{found.steps} steps kept; share of time that trains: "
        f"measured {found.measured:.1%}, predicted {found.predicted:.1%}, off by "
        f"{100 * (found.predicted - found.measured):+.1f} points",
    ]
