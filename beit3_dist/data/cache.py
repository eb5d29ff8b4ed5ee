"""Files that are derived from the data and kept beside it: written whole or not at all, by one process of many."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from beit3_dist.config import require

log = logging.getLogger(__name__)

Content = TypeVar("Content")

ABANDONED_S = 3600.0
"""A partial file that nobody has written to for so long was left by a process that is gone."""


class DamagedCache(ValueError):
    """A cache file is not what was written; the message names it."""


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
def locked(target: Path, field: str = "data.cache") -> Iterator[None]:
    """Holds the lock of a cache file; other processes wait, and find the file made when their turn comes. Raises
    ValueError naming the field where the file system has no locks."""
    folder = target.parent / "locks"
    folder.mkdir(exist_ok=True)
    with open(folder / target.name, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"{field}: cannot lock {file.name}: {error.strerror}; name a folder on a file system with locks "
                "(Lustre has them where it is mounted with the option flock)"
            ) from None
        _remove_abandoned(target.parent)
        yield


def cached(read: Callable[[], Content], make: Callable[[], object], lock: Path) -> Content:
    """What `read` finds in the cache; where that is missing or damaged, one process of many makes it by `make`. `read`
    raises FileNotFoundError or DamagedCache, as `mapped` does."""
    with suppress(FileNotFoundError, DamagedCache):
        return read()
    with locked(lock):
        try:
            return read()
        except FileNotFoundError:
            pass
        except DamagedCache as damage:
            log.warning("%s; it is made anew", damage)
        make()
    return read()


def mapped(file: Path, what: str, whole: Callable[[np.ndarray], bool]) -> np.ndarray:
    """The array of a .npy file, memory-mapped. Raises DamagedCache where it is cut or not `what` it should hold."""
    try:
        # A plain array over the mapped pages: np.memmap itself costs more than the reading of a row.
        array = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        require(whole(array), f"it holds no {what}")
        return array
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file makes numpy raise nearly anything
        raise DamagedCache(f"{file} is damaged: {error}") from None


def parsed(file: Path) -> Any:
    """The content of a .json file. Raises DamagedCache where it is cut or something else."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedCache(f"{file} is damaged: {error}") from None


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes have left half written. That the folder is opened has a use of its own: NFS then
    asks the server whether it has changed. Else a file that was missing before the lock came is missing for half a
    minute more, is made again, and takes the place of the one that others have mapped."""
    now = time.time()
    for partial in folder.glob("*.partial"):
        try:
            if now - partial.stat().st_mtime > ABANDONED_S:
                partial.unlink()
        except FileNotFoundError:
            pass  # It is whole by now, or another process has removed it.


def write_whole(target: Path, write: Callable[[BinaryIO], object], field: str = "data.cache") -> None:
    """Puts what `write` writes at `target`, which a reader sees either complete or not at all. Raises ValueError naming
    the field and the file where the disk does not take it, or what is there is no file: a device would be replaced by
    one."""
    if target.exists() and not target.is_file():
        raise ValueError(f"{field}: {target} is there and is no file: name another place")
    partial = target.with_name(f"{target.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        if error.filename not in (None, str(partial)):  # of a file that `write` reads
            raise
        reason = error.strerror or f"the disk is full ({error})"  # numpy has no words but its counts
        raise ValueError(f"{field}: cannot write {target}: {reason}; make room or name another place") from None
    finally:
        partial.unlink(missing_ok=True)
