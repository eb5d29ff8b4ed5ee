"""Files that are derived from the data and kept beside it: written whole or not at all, by one process of many."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_folder(folder: str, field: str = "data.cache") -> Path:
    """The folder, made if need be. Raises ValueError naming the field where that is impossible."""
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{field}: cannot make the folder {str(path)!r}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"{field}: the folder {str(path)!r} is not writable; name another one")
    return path


def digest(*parts: object) -> str:
    """Name of a cache file: hash of the text forms of its inputs."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of a cache file; other processes wait, and find the file made when their turn comes."""
    folder = target.parent / "locks"
    folder.mkdir(exist_ok=True)
    with open(folder / target.name, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Puts what `write` writes at `target`, which a reader sees either complete or not at all."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
