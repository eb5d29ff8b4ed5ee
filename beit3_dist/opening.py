"""Opening files that come from elsewhere: nothing in them is believed before it is checked.

Only regular files are opened: a FIFO would be waited for, a device read for ever. Small files are read up to a limit,
and the names that a file gives must stay in its folder. Every refusal is one line that names the file: OSError where
there is no such file, ValueError where its content must not be used.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import resource
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

MOST_TEXT = 1 << 24
"""Bytes (16 MiB) of the largest manifest, state or config; that of 100,000 ranks fits."""
MOST_YAML, MOST_LEVELS = 1 << 18, 50
"""Bytes (256 KiB) and nested brackets of the largest YAML file: the time to read one grows with the square of both."""
MOST_OPEN = 65536
"""Files that `open_files_allowed` asks for."""
_OTHERS = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\xfd7zXZ\0": "compressed by xz",
    b"BZh": "compressed by bzip2",
    b"PK\3\4": "a zip archive, as .xlsx is",
    b"PAR1": "a Parquet file",
}
"""First bytes of files that users take for text -> what they are."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def one_line(error: BaseException | str, most: int | None = None) -> str:
    """The error's words in one line, of `most` letters."""
    return " ".join(str(error).split())[:most]


@contextmanager
def blaming(what: str, *kinds: type[Exception], most: int | None = None) -> Iterator[None]:
    """Inside, a ValueError or an error of these kinds becomes a ValueError that begins with `what`, and is one line; of
    its own words, `most` letters."""
    blamed: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except blamed as error:
        raise ValueError(f"{what}: {one_line(error, most)}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in any OSError inside that names none, as those of a file descriptor do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_writable(folder: Path) -> None:
    """Raises ValueError where this process can neither write into a folder nor make it; leaves nothing behind."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with TemporaryDirectory(prefix=".out-", dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from None


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """A regular file, or the one that a link leads to, for reading; never waits. Raises OSError for anything else."""
    _require_regular(path, _status(path).st_mode)  # to open a device may already do something
    # Without O_NONBLOCK the opening of a FIFO itself waits for a writer; regular files do not know the difference.
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb")
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)  # it may have become another one meanwhile
    except OSError:
        file.close()
        raise
    return file


def open_files_allowed() -> int:
    """How many files this process, and those that it starts, may hold open; raised as far as the system lets it, since
    the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def regular_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a regular file, which is not opened. Raises OSError for anything else."""
    status = _status(path)
    _require_regular(path, status.st_mode)
    return status.st_size


def _status(path: str | os.PathLike[str]) -> os.stat_result:
    """What the file system says of a path. Raises ValueError that names it where it cannot be one."""
    try:
        return os.stat(path)
    except ValueError as error:  # a zero byte
        raise ValueError(f"{os.fspath(path)!r} is no path of a file: {error}") from None


def _require_regular(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"not a regular file but {kind}", os.fspath(path))


def read_text(path: str | os.PathLike[str], most: int = MOST_TEXT) -> str:
    """A small file of text in UTF-8. Raises ValueError for one of more than `most` bytes, or not in UTF-8."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{os.fspath(path)} has {size} bytes; no such file has more than {most}")
        data = file.read(size)
    try:
        return without_mark(data).decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(
            f"{os.fspath(path)} is no text in UTF-8 (byte {error.start}), line {line}: {not_utf8(data)}"
        ) from None


def without_mark(data: bytes) -> bytes:
    """The beginning of a text without the byte order mark that some editors put there."""
    return data.removeprefix(codecs.BOM_UTF8)


def is_json_object(data: bytes) -> bool:
    """Whether the beginning of a file may be that of a JSON object."""
    return without_mark(data).lstrip()[:1] == b"{"


def text_of(data: bytes) -> str:
    """Bytes of UTF-8 as text. Raises ValueError with the reason."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(not_utf8(data)) from None


def not_utf8(data: bytes) -> str:
    """Why bytes are no text in UTF-8, judged by the first of them."""
    kind = next((kind for start, kind in _OTHERS.items() if data.startswith(start)), "")
    return f"not UTF-8 but {kind}" if kind else "not UTF-8"


def parse_json(text: str) -> Any:
    """Strict JSON: no field twice, no NaN. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(fields: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(fields)
    if len(content) < len(fields):
        names = [name for name, _ in fields]
        raise ValueError(f"it has the field {next(name for name in names if names.count(name) > 1)!r} twice")
    return content


def _no_number(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number in JSON")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a small JSON file. Raises ValueError for anything else."""
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} must hold a JSON object")
    return content


class _PlainYaml(yaml.SafeLoader):
    """Safe YAML of limited depth, and without aliases, which let a few lines expand without end."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds an alias")
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level == MOST_LEVELS:
            raise yaml.YAMLError("it is nested too deeply")
        super().fetch_flow_collection_start(TokenClass)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a small YAML file that a program has written. Raises ValueError for anything else."""
    text = read_text(path, MOST_YAML)
    try:
        content = yaml.load(text, _PlainYaml)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"{os.fspath(path)} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} must hold a YAML mapping")
    return content


def inside(folder: str | os.PathLike[str], name: str) -> Path:
    """The path below a folder that a name in a file means. Raises ValueError for one that leads out of the folder.

    By the names alone: links are the owner's, who may keep the files of a folder elsewhere.
    """
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if "\0" in name or not path.startswith(os.path.join(root, "")):
        raise ValueError(f"the name {name!r} leads out of {os.fspath(folder)}")
    return Path(folder, name)
