"""What a tracker is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from beit3_dist.checkpoint.files import write_json
from beit3_dist.opening import read_json
from beit3_dist.optional import optional_module


@dataclass(frozen=True)
class Recorded:
    """The run that is recorded."""

    folder: Path
    """OUT."""
    step: int
    """Steps that were done before: 0 for a new run."""
    config: Mapping[str, Any]
    """The resolved recipe."""
    recipe: str
    """The same as YAML."""
    hashes: Mapping[str, Any]
    """Of what the run comes from: its recipe, and what its checkpoints keep of data and tokenizers."""

    def identity(self, tracker: str, new: Callable[[], str]) -> tuple[str, bool]:
        """By what a tracker knows the run again, and whether it is `new`. OUT/trackers.json keeps it, so that a run
        which goes on goes on in the same record."""
        path = self.folder / "trackers.json"
        known = read_json(path) if path.is_file() else {}
        is_new = self.step == 0 or tracker not in known
        if is_new:
            known[tracker] = new()
            write_json(path, known)
        return str(known[tracker]), is_new

    @property
    def name(self) -> str:
        """What people call it."""
        return self.folder.absolute().name


class Tracker(ABC):
    """One writer of records. Only the first process has any. Methods may raise: `Trackers` sees to it that the run goes
    on."""

    name: ClassVar[str]
    Config: ClassVar[type]
    """Dataclass of strings: its section `{NAME: {FIELD: ...}}` of the config's `trackers`."""
    module: ClassVar[str]
    """What it imports."""
    in_folder: ClassVar[bool] = False
    """Whether it is as quick and as safe as the run folder's own files: it is called at once, and what the disk does
    not take ends the run as there."""

    @classmethod
    def check(cls) -> None:
        """Raises ValueError where its package is missing."""
        remedy = f"pip install {cls.module.partition('.')[0]}, or leave {cls.name} out of trackers"
        optional_module(cls.module, f"the tracker {cls.name}", remedy)

    @abstractmethod
    def __init__(self, config: Any, run: Recorded) -> None:
        """Begins the record of a run, or goes on with it."""

    @abstractmethod
    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl (`kind` train) or eval.jsonl (eval)."""

    @abstractmethod
    def text(self, step: int, name: str, text: str) -> None:
        """A text of after `step`."""

    @abstractmethod
    def image(self, step: int, name: str, image: Tensor) -> None:
        """An image of after `step`, uint8 [3, H, W]."""

    @abstractmethod
    def close(self) -> None:
        """Ends the record; the run may go on later."""


def numbers(kind: str, record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record, as kind/NAME."""
    return {
        f"{kind}/{name}": value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name != "step" and math.isfinite(value)
    }


def flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a recipe by their dotted names, as texts."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", "" if value is None else str(value)
