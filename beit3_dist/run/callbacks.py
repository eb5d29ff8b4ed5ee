"""What a run calls as it goes on: functions of the user's, for a dashboard, a notebook, an upload.

They are called in the first process, between two steps, for which all others wait. What one raises ends the run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from beit3_dist.config import CallbackConfig, require
from beit3_dist.plugins import load_plugins

Callback = Callable[[Any], None]
NAMES = tuple(field.name for field in fields(CallbackConfig))


class Callbacks:
    """Those of a config, by import path, before those that were given as they are."""

    def __init__(self, config: CallbackConfig, given: Mapping[str, Callback] | None = None) -> None:
        """`given`: name of a field of CallbackConfig -> function. Raises ValueError naming the field for a path that
        leads to no function."""
        self._called: dict[str, list[Callback]] = {}
        for name in NAMES:
            path = getattr(config, name)
            own = [(given or {}).get(name)]
            self._called[name] = [*([_function(path, f"callbacks.{name}")] if path else []), *filter(None, own)]

    def on_step(self, record: dict[str, Any]) -> None:
        """After a step: its line of metrics.jsonl."""
        self._call("on_step", record)

    def on_validation(self, record: dict[str, Any]) -> None:
        """After a validation: its line of eval.jsonl."""
        self._call("on_validation", record)

    def on_save(self, checkpoint: Path) -> None:
        """Once a checkpoint is whole: its folder."""
        self._call("on_save", checkpoint)

    def _call(self, name: str, what: Any) -> None:
        for call in self._called[name]:
            call(what)


def _function(path: str, field: str) -> Callback:
    """The function of `module:name` or `FILE.py:name`."""
    place, _, name = path.rpartition(":")
    require(bool(place and name), f"{field}={path} is no import path: write module:function or FILE.py:function")
    try:
        load_plugins([place])
    except ValueError as error:
        raise ValueError(f"{field}: {str(error).removeprefix('plugins: ')}") from error
    module = importlib.import_module(Path(place).stem if place.endswith(".py") else place)
    found = getattr(module, name, None)
    require(callable(found), f"{field}={path}: {place} has no function {name}")
    return found  # type: ignore[return-value]  # as was just asked
