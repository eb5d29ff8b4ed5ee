"""When a run has to stop by itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import RunConfig
from beit3_dist.training.tokenizer_config import TokenizerConfig

FEWEST_SAMPLES = 10_000
"""A share of bad samples is taken of at least so many, or one bad picture could stop a run at its first step."""

SHOWN = 3
"""Shards and reasons that the report of a stopped run names."""


class RunStopped(RuntimeError):
    """The run ended itself for a reason that its message tells the user; nothing is wrong with the program."""


def check_bad_samples(config: RunConfig | TokenizerConfig, state: TrainState) -> None:
    """Raises RunStopped when more than `data.max_bad_fraction` of the samples had to be replaced."""
    samples = sum(state.consumed)
    if state.bad_samples > config.data.max_bad_fraction * max(samples, FEWEST_SAMPLES):
        raise RunStopped(
            f"data.max_bad_fraction={config.data.max_bad_fraction}: {state.bad_samples:,} of {samples:,} samples "
            f"had to be replaced by step {state.step}; {_most_frequent(Path(config.out, 'quarantine.jsonl'))}"
        )


def _most_frequent(quarantine: Path) -> str:
    """The shards and reasons that quarantine.jsonl names most often."""
    shards: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    broken = 0
    for line in quarantine.read_text(errors="replace").splitlines():
        try:
            fault = json.loads(line)
            shard, reason = str(fault["shard"]), str(fault["reason"])
        except (ValueError, KeyError, TypeError):  # a crash or a full disk cut it off
            broken += 1
            continue
        shards[shard] += 1
        reasons[reason.partition(":")[0]] += 1  # what follows a colon is about one file: sizes, offsets
    shard_list, reason_list = (
        ", ".join(f"{name} ({count:,})" for name, count in found.most_common(SHOWN)) for found in (shards, reasons)
    )
    whole = f"names them, but {broken:,} of its lines cannot be read" if broken else "names every one"
    return f"most of them in {shard_list}; reasons: {reason_list}; {quarantine} {whole}"
