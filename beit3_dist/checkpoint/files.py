"""Files that are whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beit3_dist.opening import open_regular


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what then replaces a file in one step: after a crash it holds the old content or the new, never a
    mixture. An error inside leaves the old file and nothing beside it."""
    aside = path.with_name(f".{path.name}.new")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_made_aside(out: Path) -> Iterator[Path]:
    """OUT.partial to fill, renamed to OUT when all went well, else removed; what a killed process left there is
    replaced. Raises ValueError where OUT is in use."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists; remove it or name another folder")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file's text in one step."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def as_json(value: Any) -> str:
    """Indented JSON, as files hold it."""
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, as_json(value))


def sha256(path: Path) -> str:
    """Hex digest of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashed(path: Path, parts: Sequence[bytes | memoryview]) -> dict[str, Any]:
    """Writes and syncs a new file of these parts. What a manifest says of it: its size, and the SHA-256 of what it
    should hold, taken while it is written."""

    def digest() -> str:
        sha = hashlib.sha256()
        for part in parts:
            sha.update(part)
        return sha.hexdigest()

    with ThreadPoolExecutor(1) as hashing, open(path, "wb") as file:
        sha256 = hashing.submit(digest)
        size = sum(file.write(part) for part in parts)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": size, "sha256": sha256.result()}
