"""The tasks by their names: the files beside this one, imported when they are asked for, and those of plugins."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # it needs torch, which takes seconds to import
    from beit3_dist.tasks.base import Task

T = TypeVar("T", bound="type[Task]")

_FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))}
BUILT_IN = [name for name in _FILES if name not in ("base", "config", "registry")]
"""The package's tasks: each is the file of its name."""

_registered: dict[str, type[Task]] = {}


def register(name: str) -> Callable[[T], T]:
    """Decorator of a task's class: from here on `task: NAME` means it. A plugin does no more. Raises ValueError where
    another task has the name."""

    def add(task: T) -> T:
        other = f"{__package__}.{name}" if name in BUILT_IN else _registered.get(name, task).__module__
        if task.__module__ != other:
            raise ValueError(f"the task {name!r} of {task.__module__} has the name of that of {other}: give it another")
        task.name = name
        _registered[name] = task
        return task

    return add


def task_names() -> list[str]:
    """All tasks, those of the package first."""
    return list(dict.fromkeys([*BUILT_IN, *_registered]))


def task_class(name: str) -> type[Task]:
    """The task of a name. Raises ValueError naming all where there is none."""
    if name in BUILT_IN:
        import_module(f"{__package__}.{name}")
    if name not in _registered:
        raise ValueError(f"task={name!r} is not one of {', '.join(task_names())}, nor that of an imported plugin")
    return _registered[name]


def pretrained_tasks(objectives: Iterable[str]) -> list[str]:
    """The tasks that a model pretrained by these objectives serves for as it is."""
    return [name for name in task_names() if vars(task_class(name)).get("pretrained_by") in set(objectives)]


def summaries() -> str:
    """What the package's tasks are, by the first line of each one's file, for a help that needs no torch."""
    docs = {name: ast.get_docstring(ast.parse(_FILES[name].read_text("utf-8"))) or "" for name in BUILT_IN}
    return " ".join(f"{name}: {doc.splitlines()[0]}" for name, doc in docs.items())
