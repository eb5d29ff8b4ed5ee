"""Which files and members count, and as what: one rule for tars and folders, whoever reads them.

A name's extension says what it is, in any case of letters. What a system put there by itself does not count: names that
begin with a dot (`._a.jpg` holds a Mac's file attributes, `.DS_Store` its view of a folder) and what lies in __MACOSX.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

IMAGE, TXT, JSON, JSONL = range(4)
"""Kinds of members, and their columns in a scan."""
KIND_NAMES = ("image", ".txt", ".json", ".jsonl")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif")
KINDS = {name.encode(): IMAGE for name in IMAGE_EXTENSIONS} | {b"txt": TXT, b"json": JSON, b"jsonl": JSONL}
TARS = (".tar", ".tar.gz", ".tgz")
LONGEST_EXTENSION = 8
"""Characters; what follows a dot and is longer is part of a name."""
HIDDEN = "hidden"
"""The reason of what does not count and is not missed."""

LeftOut = dict[str, tuple[int, str]]
"""What is not used: reason -> how many, and the name of the first."""


def leave_out(left_out: LeftOut, reason: str, name: str) -> None:
    count, first = left_out.get(reason, (0, name))
    left_out[reason] = count + 1, first


def told(left_out: LeftOut) -> Iterator[str]:
    for reason, (count, first) in left_out.items():
        yield f"left out {count:,} files: {reason}; the first is {first}"


def hidden(name: bytes) -> bool:
    """Whether a path is a system's own: a part of it begins with a dot, or is __MACOSX."""
    if not (name.startswith(b".") or b"/." in name or b"__MACOSX" in name):
        return False  # nearly all
    return any(part == b"__MACOSX" or part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


def key_and_extension(name: bytes) -> tuple[bytes, bytes]:
    """A member's key, its path up to the last dot, and what follows that, in lower case."""
    key, _, extension = name.rpartition(b".")
    return key, extension.lower()


def key_and_kind(name: bytes) -> tuple[bytes, int | None]:
    """A member's key and its kind; None if it does not count."""
    key, extension = key_and_extension(name)
    return key, None if hidden(name) else KINDS.get(extension)


def why_not(name: bytes) -> str:
    """Why a name of no kind that is wanted does not count."""
    if hidden(name):
        return HIDDEN
    stem, dot, extension = name.rpartition(b"/")[2].rpartition(b".")
    if not dot or not extension.isalnum() or len(extension) > LONGEST_EXTENSION:
        return "no known extension"
    return f"extension .{extension.lower().decode()}"


def is_tar(path: str) -> bool:
    """Whether a file is named like a tar, compressed or not."""
    return path.lower().endswith(TARS)


def is_jsonl(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).lower().endswith(".jsonl")


def is_json(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named like JSON, which may be an array or lines."""
    return is_jsonl(path) or os.fspath(path).lower().endswith(".json")


def folders_in(folder: Path, left_out: LeftOut) -> list[str]:
    """Names of the folders in a folder, sorted: links to folders too, hidden ones not. What else is there is counted,
    by its path."""
    found = []
    for path in sorted(folder.iterdir()):
        if hidden(os.fsencode(path.name)):
            leave_out(left_out, HIDDEN, os.fspath(path))
        elif path.is_dir():
            found.append(path.name)
        else:
            leave_out(left_out, "beside the folders", os.fspath(path))
    return found


def images_in(folder: Path, left_out: LeftOut) -> list[str]:
    """Names of the images in a folder, sorted. What else is there is counted, by its path."""
    found = []
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if reason := _no_image(path):
            leave_out(left_out, "a folder" if reason != HIDDEN and path.is_dir() else reason, os.fspath(path))
        else:
            found.append(name)
    return found


def images_below(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """All images below a folder, as `_below` finds them."""
    return _below(folder, left_out, _no_image)


def tables_below(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """All files of parquet below a folder, as `_below` finds them."""
    return _below(folder, left_out, _no_table)


def _below(folder: Path, left_out: LeftOut, against: Callable[[Path], str]) -> Iterator[Path]:
    """All files below a folder that nothing speaks against, folder by folder in the order of their names; what else is
    there is counted. Links are followed; each folder comes once, whatever leads there."""

    def lost(path: str, reason: str) -> None:
        leave_out(left_out, reason, os.path.relpath(path, folder))

    def unreadable(error: OSError) -> None:
        lost(error.filename, error.strerror or str(error))

    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        status = os.stat(parent)
        place = status.st_dev, status.st_ino
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        for name in sorted(names):
            path = Path(parent, name)
            if reason := against(path):
                lost(os.fspath(path), reason)
            else:
                yield path
        for name in [name for name in folders if hidden(os.fsencode(name))]:
            lost(os.path.join(parent, name), HIDDEN)
            folders.remove(name)
        folders.sort()


def _no_table(path: Path) -> str:
    """Why a path is no table of parquet; empty if it may be one."""
    name = os.fsencode(path.name)
    return why_not(name) if hidden(name) or not path.name.endswith(".parquet") else _no_file(path)


def _no_image(path: Path) -> str:
    """Why a path is no image; empty if it may be one, which its content is not asked for."""
    name = os.fsencode(path.name)
    return why_not(name) if key_and_kind(name)[1] != IMAGE else _no_file(path)


def _no_file(path: Path) -> str:
    """Why a path is no file that can be read; empty if it is one."""
    try:
        return "" if stat.S_ISREG(path.stat().st_mode) else "not a regular file"
    except OSError as error:
        return error.strerror or str(error)
