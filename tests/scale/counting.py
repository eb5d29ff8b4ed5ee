"""What a process asks of file systems and of other processes, counted while it runs.

Opens are the interpreter's audit events, so that nobody who opens a file is missed; looks are calls of os.stat and its
like, and listed folders. Only what lies below a folder counts: modules that Python imports on the way do not. Messages
are the calls of torch's process groups, DeepSpeed's among them.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

LOOKS = ("stat", "lstat", "access", "scandir", "listdir")
MESSAGES = (
    "allreduce", "allgather", "_allgather_base", "broadcast", "reduce", "reduce_scatter", "_reduce_scatter_base",
    "gather", "scatter", "alltoall", "alltoall_base", "send", "recv", "barrier", "all_gather_single",
    "reduce_scatter_single", "all_to_all_single",
)  # fmt: skip
"""Methods of a process group. The last three are torch 2.13's for what had an underscore, or base, before."""
OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


@dataclass
class Costs:
    """Of a stretch of a process's life."""

    opens: Counter[str] = field(default_factory=Counter)
    """File -> times that it was opened."""
    looks: Counter[str] = field(default_factory=Counter)
    """Path -> times that it was looked at or listed."""
    read: int = 0
    """Bytes that system calls have read, of files and pipes alike; pages of mapped files apart."""
    messages: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(method of the process group, bytes that this process puts in) -> calls."""
    objects: int = 0
    """Collectives of Python objects, whose messages count as well."""

    @property
    def opened(self) -> int:
        return self.opens.total()

    @property
    def looked(self) -> int:
        return self.looks.total()

    @property
    def calls(self) -> int:
        return self.messages.total()

    @property
    def sent(self) -> int:
        """Bytes."""
        return sum(size * calls for (_, size), calls in self.messages.items())

    def __str__(self) -> str:
        return (
            f"{self.opened:7d} opens {self.looked:8d} looks {self.read / 1e6:9.3f} MB read {self.calls:5d} messages of "
            f"{self.sent / 1e6:8.3f} MB, {self.objects} of objects"
        )


class Count:
    """The costs since the last `mark`, which gives them and begins anew."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.costs = os.path.join(os.path.abspath(folder), ""), Costs()
        self._read = _bytes_read()

    def mark(self) -> Costs:
        costs, self.costs = self.costs, Costs()
        now = _bytes_read()
        costs.read, self._read = now - self._read, now
        return costs

    def path(self, what: Any, kind: Counter[str]) -> None:
        """Counts a path below the folder, by its name there."""
        if isinstance(what, str | bytes | os.PathLike):
            name = os.path.abspath(os.fsdecode(what))
            if name.startswith(self.folder):
                kind[name.removeprefix(self.folder)] += 1


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].partition("\n")[0])


_counts: list[Count] = []
"""Those that are counting. An audit hook stays for the life of its process."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for count in _counts:
            count.path(arguments[0], count.costs.opens)


_hooked = False


@contextmanager
def counting(folder: Path) -> Iterator[Count]:
    """Counts what this process does inside, on paths below `folder`."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    count = Count(folder)
    with ExitStack() as stack:
        for name in LOOKS:
            stack.enter_context(patch.object(os, name, _looked(count, getattr(os, name))))
        for name in filter(partial(hasattr, dist.ProcessGroup), MESSAGES):
            stack.enter_context(patch.object(dist.ProcessGroup, name, _sent(count, name)))
        for name in OBJECTS:
            stack.enter_context(patch.object(dist, name, _objects(count, getattr(dist, name))))
        _counts.append(count)
        stack.callback(_counts.remove, count)
        yield count


def _looked(count: Count, function: Callable[..., Any]) -> Callable[..., Any]:
    def look(path: Any = ".", *arguments: Any, **keywords: Any) -> Any:
        count.path(path, count.costs.looks)
        return function(path, *arguments, **keywords)

    return look


def _sent(count: Count, name: str) -> Callable[..., Any]:
    method = getattr(dist.ProcessGroup, name)

    def send(group: dist.ProcessGroup, *arguments: Any, **keywords: Any) -> Any:
        if group.size() > 1:  # with itself, a process communicates for nothing
            # Gathering and scattering methods of torch take first what they fill.
            fills = "gather" in name or "scatter" in name or name.startswith(("alltoall", "all_to_all"))
            own = arguments[1] if fills else arguments[:1]
            count.costs.messages[name, _bytes(own)] += 1
        return method(group, *arguments, **keywords)

    return send


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.itemsize
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _objects(count: Count, function: Callable[..., Any]) -> Callable[..., Any]:
    def communicate(*arguments: Any, **keywords: Any) -> Any:
        count.costs.objects += 1
        return function(*arguments, **keywords)

    return communicate
