"""How long a run takes on devices that fail: its useful share of time, and how often to save.

A run of `steps` steps on `devices` devices saves every so many steps. A save stops the training for `pause_s`; it is on
the disk `durable_s` later, and only then it counts. A failure, on average every mtbf / devices seconds (a Poisson
process: as good as what is published), costs the steps since the last save that counts, what it takes to notice
(`noticed_s`), to get the devices again (`requeue_s`) and to start (`restart_s`), in which failures come, too.

Published rates of failures that stop a job, per device-hour:
- Llama 3 405B (Grattafiori et al. 2024, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100:
  1.97e-5, a failure every 50,700 device-hours;
- OPT-175B (Zhang et al. 2022): at least 35 manual and some 70 automatic restarts in two months on 992 A100: 7.3e-5;
- Meta's research clusters (Kokolis et al. 2024): 6.5 failures a thousand node-days of 8 A100: 3.4e-5.

First-order optimum of the time between saves: Young (1974), sqrt(2 pause mtbf); Daly (2006) adds higher orders. Both
know no time until a save counts, which delays the loss by `durable_s` and leaves the optimum where it is, as long as
saves do not follow one another faster than they become durable.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from statistics import mean

PER_DEVICE_HOUR = 419 / (54 * 24 * 16_384)
"""Llama 3's."""
DAY_S = 86_400.0
MOST_FAILURES = 10_000
"""That a run is followed through. Where it saves, or starts, more slowly than it fails, it never ends."""


@dataclass(frozen=True)
class Run:
    """A run and what disturbs it. Times in seconds."""

    steps: int
    step_s: float
    devices: int
    every: int
    """Steps between saves."""
    pause_s: float = 2.0
    """What a save stops the training for: the copy to host memory."""
    durable_s: float = 60.0
    """From then on, until it is on the disk."""
    restart_s: float = 180.0
    """From the start of the processes to the first step."""
    requeue_s: float = 60.0
    """Until the devices are there again."""
    noticed_s: float = 30.0
    """From the failure to the job's end."""
    failures_per_device_hour: float = PER_DEVICE_HOUR

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures of any device."""
        rate = self.failures_per_device_hour * self.devices
        return 3600.0 / rate if rate else math.inf

    @property
    def undisturbed_s(self) -> float:
        """Steps alone."""
        return self.steps * self.step_s


@dataclass(frozen=True)
class Lived:
    """A simulated run."""

    seconds: float
    """Infinite where it has met MOST_FAILURES before its last step."""
    failures: int
    lost_s: float
    """Of steps that were taken again."""
    paused_s: float
    down_s: float
    """Noticing, requeueing, restarting."""

    def share(self, run: Run) -> float:
        """Share of the time that trained."""
        return run.undisturbed_s / self.seconds


def lived(run: Run, draw: random.Random) -> Lived:
    """One life of the run, from save to save and from failure to failure."""
    now, done, failures, lost, paused, down = run.restart_s, 0, 0, 0.0, 0.0, run.restart_s
    following = draw.expovariate(1 / run.mtbf_s) if run.mtbf_s < math.inf else math.inf
    saved = [(0.0, 0)]
    """(when it counts, steps), of the last two saves: a third would wait for the first."""
    while done < run.steps and failures < MOST_FAILURES:
        steps = min(run.every - done % run.every, run.steps - done)
        span = steps * run.step_s
        if now + span + run.pause_s <= following:
            now += span + run.pause_s
            paused += run.pause_s
            done += steps
            counts = max(now, saved[-1][0]) + run.durable_s
            saved = [*saved[-1:], (counts, done)]
            continue
        failed = following
        taken = max(0.0, failed - now)
        kept = max((steps for when, steps in saved if when <= failed), default=saved[0][1])
        lost += min(taken, span) + (done - kept) * run.step_s
        paused += max(0.0, taken - span)
        failures += 1
        stop = run.noticed_s + run.requeue_s + run.restart_s
        now, done = failed + stop, kept
        down += stop
        saved = [(0.0, kept)]
        following = failed + draw.expovariate(1 / run.mtbf_s)
        # Another one while nothing runs: what was to be waited for begins again.
        while following < now and failures < MOST_FAILURES:
            failures += 1
            again = following + run.requeue_s + run.restart_s
            down += again - now if again > now else 0.0
            now = max(now, again)
            following += draw.expovariate(1 / run.mtbf_s)
    return Lived(now if done == run.steps else math.inf, failures, lost, paused, down)


def lives(run: Run, count: int, seed: int = 0) -> list[Lived]:
    """`count` lives of the run; the same draws for any run."""
    return [lived(run, random.Random(f"{seed}-{number}")) for number in range(count)]


def expected_s(run: Run, count: int = 50) -> float:
    """Mean time of `count` lives."""
    return mean(life.seconds for life in lives(run, count))


def young_s(run: Run) -> float:
    """Seconds of steps between saves by Young's formula."""
    return math.sqrt(2 * run.pause_s * run.mtbf_s)


def daly_s(run: Run) -> float:
    """The same by Daly's formula of higher order."""
    pause, mtbf = run.pause_s, run.mtbf_s
    if pause >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(pause / (2 * mtbf))
    return math.sqrt(2 * pause * mtbf) * (1 + ratio / 3 + ratio**2 / 9) - pause


def best_every(run: Run, count: int = 20) -> int:
    """Steps between saves with the shortest expected time, among powers of 2^(1/2) around Young's, none of which is
    shorter than a save takes to count."""
    if run.mtbf_s == math.inf:
        return run.steps
    around = young_s(run) / run.step_s
    least = max(1.0, run.durable_s / run.step_s)
    tried = {min(run.steps, max(math.ceil(least), round(around * 2 ** (n / 2)))) for n in range(-4, 5)}
    return min(sorted(tried), key=lambda every: expected_s(replace(run, every=every), count))


def table(run: Run, step_s_of: dict[int, float]) -> list[str]:
    """For each number of devices, with the seconds of its step: expected days, share of time, best interval."""
    lines = [
        f"a failure every {1 / run.failures_per_device_hour:,.0f} device-hours; a save pauses {run.pause_s:g} s and "
        f"counts {run.durable_s:g} s later; {run.noticed_s:g} + {run.requeue_s:g} + {run.restart_s:g} s to notice, "
        "requeue, restart",
        f"{'devices':>8}{'s/step':>9}{'MTBF h':>9}{'days':>9}{'undisturbed':>13}{'failures':>10}{'trains':>8}"
        f"{'save every':>12}{'Young':>8}{'Daly':>8}{'trains then':>13}",
    ]
    for devices, step_s in step_s_of.items():
        own = replace(run, devices=devices, step_s=step_s)
        some = lives(own, 50)
        seconds = mean(life.seconds for life in some)
        best = best_every(own)
        then = own.undisturbed_s / expected_s(replace(own, every=best))
        lines.append(
            f"{devices:8}{step_s:9.3f}{own.mtbf_s / 3600:9.1f}{seconds / DAY_S:9.2f}{own.undisturbed_s / DAY_S:13.2f}"
            f"{mean(life.failures for life in some):10.1f}{own.undisturbed_s / seconds:8.2%}{best:12,}"
            f"{young_s(own) / step_s:8,.0f}{daly_s(own) / step_s:8,.0f}{then:13.2%}"
        )
    return lines
