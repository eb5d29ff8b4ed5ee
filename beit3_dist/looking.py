"""One process looks at files, the others receive what it has seen.

At the start of a run every process needs to know which shards there are, where the run goes on, what a checkpoint
holds. A thousand processes that ask a file system the same would be its heaviest load. So one asks: of all processes
where the file is the same for all (`of_run`), of each node where a node may have its own (`of_node`: data, tokenizers).
Outside of `together`, every process is one alone, and looks for itself.

What is told is plain: numbers, texts, bytes, and lists and dicts of these by text. It goes through the key-value store
at which the processes meet, before there are process groups.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

Seen = TypeVar("Seen")

PATIENCE = timedelta(days=7)
"""How long a process waits for the one that looks: shards that are indexed for the first time take hours. It ends
sooner where that one does, since the launcher, or the store that is gone, tells."""
HEARD_S = 5.0
"""How long the first process, if it has met a mistake, waits for the others to hear of it."""
CHUNK = 1 << 22
"""Bytes of a value in the store, which takes no more than 8 MiB."""
BYTES = "\0bytes"
"""Name of the one field of what stands for bytes in JSON."""


class ToldElsewhere(Exception):
    """The process that looked has met a mistake and tells it."""


class Store(Protocol):
    """As much of torch's key-value stores as is needed."""

    def set(self, key: str, value: Any, /) -> None: ...  # bytes or text, whatever torch's stubs say
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, value: int, /) -> int: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


class Looks:
    """The looks of some processes, which all of them take in the same order; one of them opens files."""

    def __init__(self, meet: Callable[[], Store] | None, name: str, looks: bool, others: int = 0) -> None:
        """`meet`: finds the store, at the first look; None: the process is alone. `name`: of these processes' own part
        of the store. `looks`: whether this is the one that opens files. `others`: how many have to hear of a
        mistake before it ends, since the store ends with it."""
        self._meet, self._name, self._looks, self._taken = meet, name, looks, 0
        self.others = others
        self._store: Store | None = None

    def __call__(self, read: Callable[[], Seen]) -> Seen:
        """What `read` gives in the process that looks. Raises ToldElsewhere in the others where it fails there."""
        if self._meet is None:
            return read()
        self._store = store = self._store or self._meet()
        if not self._looks:
            return self._received(store)
        seen = read()  # `together` tells of an error
        self._send(store, pack(seen))
        return seen

    @property
    def has_met(self) -> bool:
        """Whether this process has met the others."""
        return self._store is not None

    def fail(self) -> None:
        """Ends the waiting of the others: nothing more is looked at."""
        if self._meet is not None and self._looks:
            self._send(self._meet(), b"")

    def heard(self) -> int:
        """How many processes know that."""
        return 0 if self._meet is None else self._meet().add(f"{self._name}/heard", 0)

    def _send(self, store: Store, content: bytes) -> None:
        key = self._next()
        parts = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
        for number, part in enumerate(parts):
            store.set(f"{key}/{number}", part)
        store.set(key, str(len(parts)))

    def _received(self, store: Store) -> Any:
        key = self._next()
        try:
            store.wait([key], PATIENCE)
            content = b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key))))
        except RuntimeError as error:  # the store is gone, and with it the first process
            raise ToldElsewhere(str(error)) from error
        if not content:
            store.add(f"{self._name}/heard", 1)
            raise ToldElsewhere(key)
        return unpack(content)

    def _next(self) -> str:
        self._taken += 1
        return f"{self._name}/{self._taken}"


def pack(seen: Any) -> bytes:
    """A plain value as bytes, never none."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return {BYTES: base64.b85encode(value).decode()}
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return zlib.compress(json.dumps(plain(seen)).encode(), 1)


def unpack(content: bytes) -> Any:
    """The value, whose tuples have become lists."""
    return json.loads(zlib.decompress(content), object_hook=_bytes)


def _bytes(fields: dict[str, Any]) -> Any:
    return base64.b85decode(fields[BYTES]) if BYTES in fields else fields


ALONE = Looks(None, "", True)
_of_run: ContextVar[Looks] = ContextVar("of_run", default=ALONE)
_of_node: ContextVar[Looks] = ContextVar("of_node", default=ALONE)


def of_run(read: Callable[[], Seen]) -> Seen:
    """What one process of the run reads, for files that all of them see alike. Collective inside `together`."""
    return _of_run.get()(partial(_alone, read))


def of_node(read: Callable[[], Seen]) -> Seen:
    """What one process of each node reads, for files that a node may have of its own. Collective inside `together`."""
    return _of_node.get()(partial(_alone, read))


def _alone(read: Callable[[], Seen]) -> Seen:
    """The process that looks asks nobody on the way."""
    with _looking(ALONE, ALONE):
        return read()


@contextmanager
def _looking(run: Looks, node: Looks) -> Iterator[None]:
    tokens = _of_run.set(run), _of_node.set(node)
    try:
        yield
    finally:
        _of_run.reset(tokens[0])
        _of_node.reset(tokens[1])


@contextmanager
def together(run: Looks, node: Looks) -> Iterator[None]:
    """Inside, the processes look together. Where this one leaves it by an error, those that wait for it end as well."""
    with _looking(run, node):
        try:
            yield
        except BaseException:
            if run.has_met or node.has_met:
                run.fail()
                node.fail()
                deadline = time.monotonic() + HEARD_S
                while run.others and run.heard() + node.heard() < run.others and time.monotonic() < deadline:
                    time.sleep(0.01)
            raise
