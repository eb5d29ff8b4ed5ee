"""The trackers by their names, and those of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from beit3_dist.config import require
from beit3_dist.trackers.base import Tracker
from beit3_dist.trackers.mlflow import Mlflow
from beit3_dist.trackers.tensorboard import TensorBoard
from beit3_dist.trackers.trackio import Trackio
from beit3_dist.trackers.wandb import Wandb

BUILT_IN: list[type[Tracker]] = [TensorBoard, Wandb, Mlflow, Trackio]
TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in BUILT_IN}

Kind = TypeVar("Kind", bound=type[Tracker])


def register(tracker: Kind) -> Kind:
    """Makes a tracker known; to be used as a decorator. Raises ValueError where its name is taken."""
    require(tracker.name not in TRACKERS, f"there are two trackers named {tracker.name}")
    TRACKERS[tracker.name] = tracker
    return tracker


def chosen(trackers: Sequence[str | dict[str, Any]]) -> list[tuple[type[Tracker], Any]]:
    """The trackers that a config names, each with its section. Raises ValueError that names what is wrong."""
    found: dict[str, tuple[type[Tracker], Any]] = {}
    for entry in trackers:
        sections = {entry: {}} if isinstance(entry, str) else entry
        require(bool(sections), f"trackers: an entry is empty: name {', '.join(TRACKERS)}, or leave it out")
        for name, section in sections.items():
            known = f"only {', '.join(TRACKERS)}; the file that defines another one is named by plugins"
            require(name in TRACKERS, f"trackers: there is no {name}, {known}")
            require(name not in found, f"trackers: {name} stands there twice")
            found[name] = TRACKERS[name], _section(name, TRACKERS[name].Config, section or {})
    return [*found.values()]


def _section(name: str, config: type, section: Any) -> Any:
    require(isinstance(section, dict), f"trackers.{name} is a section of fields, not {section!r}")
    known = [field.name for field in fields(config)]
    for field, value in section.items():
        require(field in known, f"trackers.{name}: there is no field {field}, only {', '.join(known) or 'none at all'}")
        require(isinstance(value, str), f"trackers.{name}.{field}={value!r} is no text")
    return config(**section)


def check_trackers(trackers: Sequence[str | dict[str, Any]], is_first: bool) -> None:
    """Raises ValueError for a tracker that there is not, or whose package is missing where the first process runs."""
    for tracker, _ in chosen(trackers):
        if is_first:
            tracker.check()
