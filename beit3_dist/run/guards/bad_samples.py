"""Samples that had to be replaced: too many of them end the run, with the shards and reasons that are most frequent."""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from pathlib import Path

import torch.distributed as dist

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.endings import RunStopped

log = logging.getLogger(__name__)

FEWEST_SAMPLES = 10_000
"""The share of bad samples is of at least so many samples; else one bad image could stop a run at its first step."""

RECENT_STEPS = 1_000
"""The share of the last so many steps counts, too: late in a run, the share of all steps would hide for days that half
of the data have become unreadable."""

WORTH_A_WARNING = 0.01
"""Share of a step's samples."""

NAMED = 3
"""Shards, and reasons, that a stopped run names."""


class BadSamples:
    """Watches, step by step, how many samples have to be replaced."""

    def __init__(self, share: float, out: Path, mesh: Mesh, state: TrainState) -> None:
        """`share`: data.max_bad_fraction. `state`: where the run goes on."""
        self._share, self._quarantine, self._mesh = share, out / "quarantine.jsonl", mesh
        self._samples, self._bad = sum(state.consumed.values()), state.bad_samples
        self._recent: deque[int] = deque(maxlen=RECENT_STEPS)
        """Replaced samples of the last steps; none of those before a resume."""

    def check(self, state: TrainState) -> None:
        """After a step. Raises RunStopped, on all ranks, when more than `data.max_bad_fraction` of all samples, or of
        those of RECENT_STEPS steps, had to be replaced. Collective where it does."""
        samples, bad = sum(state.consumed.values()), state.bad_samples
        in_step, replaced = samples - self._samples, bad - self._bad
        self._samples, self._bad = samples, bad
        self._recent.append(replaced)
        if self._mesh.is_first and replaced > WORTH_A_WARNING * in_step:
            log.warning("step %d: %d bad samples had to be replaced for its %d", state.step, replaced, in_step)
        recent, in_recent = sum(self._recent), RECENT_STEPS * in_step
        if bad > self._share * max(samples, FEWEST_SAMPLES):
            self._stop(f"{bad:,} of {samples:,} samples had to be replaced by step {state.step}", since=0)
        if recent > self._share * max(in_recent, FEWEST_SAMPLES):
            first = state.step - len(self._recent) + 1
            what = f"{recent:,} samples had to be replaced in steps {first} to {state.step}"
            self._stop(f"{what}, more than that share of {RECENT_STEPS:,} steps ({in_recent:,} samples)", since=first)

    def _stop(self, what: str, since: int) -> None:
        """The first process reads the quarantine, perhaps gigabytes, for all: none of them ends before that is done."""
        report = [_most_frequent(self._quarantine, since) if self._mesh.is_first else ""]
        if self._mesh.world > 1:
            dist.broadcast_object_list(report)
        raise RunStopped(f"data.max_bad_fraction={self._share}: {what}; {report[0]}")


def _most_frequent(quarantine: Path, since: int) -> str:
    """The shards and reasons that quarantine.jsonl names most often from step `since` on."""
    shards: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    broken = 0
    with open(quarantine, "rb") as lines:
        for line in lines:
            try:
                fault = json.loads(line)
                step, shard, reason = int(fault["step"]), str(fault["shard"]), str(fault["reason"])
            except (ValueError, KeyError, TypeError):  # a crash or a full disk cut it off
                broken += 1
                continue
            if step >= since:
                shards[shard] += 1
                reasons[reason.partition(":")[0]] += 1  # what follows a colon is about one file: sizes, offsets
    shard_list, reason_list = (
        ", ".join(f"{name} ({count:,})" for name, count in found.most_common(NAMED)) for found in (shards, reasons)
    )
    whole = f"names them, but {broken:,} of its lines cannot be read" if broken else "names every one"
    return f"most of them in {shard_list}; reasons: {reason_list}; {quarantine} {whole}"
