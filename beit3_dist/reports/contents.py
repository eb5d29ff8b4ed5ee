"""What a page says of a run: all that its folder tells without opening a model or data."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from beit3_dist.config import STREAMS, require
from beit3_dist.opening import read_text, read_yaml
from beit3_dist.reports.history import Followed, History
from beit3_dist.trackers.base import flat

RECORDS = ("metrics", "eval", "skipped", "quarantine")
MOST_REASONS, MOST_SKIPPED = 30, 200
"""Lines of a table of faults, and skipped steps that are named: a page has bounds whatever happened to its run."""
LONGEST = 300
"""Letters of a fault's reason."""


class RunContents:
    """A run folder, pretraining's or any other of the training loop, which may still grow."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder of no run."""
        require((folder / "config.yaml").is_file(), f"{folder} is not a run folder: it has no config.yaml")
        self.folder = folder
        self._files = {name: Followed(folder / f"{name}.jsonl") for name in RECORDS}
        self._begin()

    def _begin(self) -> None:
        self._steps, self._validations = History(), History()
        self._skipped: dict[int, None] = {}
        self._replaced: Counter[tuple[str, str]] = Counter()
        self._examples: dict[tuple[str, str], str] = {}

    def read(self) -> bool:
        """Reads what has been added. Whether there was anything."""
        if any([file.cut_back() for file in self._files.values()]):  # each is asked
            self._files = {name: Followed(file.path) for name, file in self._files.items()}
            self._begin()
        before = self._counted()
        self._steps.add(self._files["metrics"].new())
        self._validations.add(self._files["eval"].new())
        self._skipped |= dict.fromkeys(record["step"] for record in self._files["skipped"].new())
        for fault in self._files["quarantine"].new():
            key = str(fault.get("stream", "")), str(fault.get("reason", ""))[:LONGEST]
            self._replaced[key] += 1
            self._examples.setdefault(key, f"{fault.get('shard', '')} {fault.get('key', '')}".strip()[:LONGEST])
        return self._counted() != before

    def _counted(self) -> tuple[int, ...]:
        return self._steps.records, self._validations.records, len(self._skipped), self._replaced.total()

    @property
    def trained(self) -> bool:
        """Whether there is a step in it."""
        return self._steps.records > 0

    def told(self, name: str) -> dict[str, Any]:
        """For the page, as JSON can hold it; `name` is what the run is called there."""
        steps, last = self._steps, self._steps.last
        recipe = read_text(self.folder / "config.yaml")
        config = dict(flat(read_yaml(self.folder / "config.yaml")))
        path = self._files["metrics"].path
        return {
            "name": name,
            "folder": str(self.folder),
            "step": last.get("step", 0),
            "planned": int(config.get("steps", 0)),
            "computes": str(last.get("computes", "")),
            "seconds": steps.total("step_s"),
            "waited": steps.total("data_wait_s"),
            "samples": {stream: int(steps.total(stream)) for stream in STREAMS if steps.total(stream)},
            "memory_gb": last.get("memory_gb"),
            "written": path.stat().st_mtime if path.is_file() else time.time(),
            "first": numbers(steps.first),
            "recent": steps.recent(),
            "train": steps.curves(),
            "held_out": self._validations.curves(),
            "last_held_out": numbers(self._validations.last),
            "skipped": [*self._skipped][:MOST_SKIPPED],
            "skipped_count": len(self._skipped),
            "replaced": [
                {"stream": key[0], "reason": key[1], "count": count, "example": self._examples[key]}
                for key, count in self._replaced.most_common(MOST_REASONS)
            ],
            "replaced_count": self._replaced.total(),
            "replaced_reasons": len(self._replaced),
            "stretches": list(stretches(self.folder)),
            "config": config,
            "recipe": recipe,
        }


def numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, (int, float)) and isfinite(value)}


def stretches(folder: Path) -> Iterator[dict[str, Any]]:
    """After which steps the run was begun and begun again, and what the recipe said anew each time."""
    begun = {}
    for path in folder.glob("config_step_*.yaml"):
        if match := re.fullmatch(r"config_step_(\d+)\.yaml", path.name):
            begun[int(match[1])] = path
    former: dict[str, str] = {}
    for number, step in enumerate(sorted(begun)):
        config = dict(flat(read_yaml(begun[step])))
        names = [name for name in {**former, **config} if former.get(name) != config.get(name)] if number else []
        changed = [f"{name}: {former.get(name, '')} → {config.get(name, '')}"[:LONGEST] for name in names]
        yield {"after": step, "changed": changed}
        former = config
