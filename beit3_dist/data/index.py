"""Where every member of every tar lies: scanned once, kept in the cache folder, read by offset ever after.

A shard's scan is a sidecar file. The scans of a stream's shards are merged into one table file that is memory-mapped,
so that all ranks and workers of a machine share its pages and no Python object exists per sample. Members of a sample
are joined by key inside one shard, adjacent or not; keys may start again in the next shard.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from braceexpand import braceexpand
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from beit3_dist.data.cache import cache_folder, digest, locked, write_whole
from beit3_dist.data.order import Stream
from beit3_dist.data.unpack import plain_tar

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FORMAT = 1
"""Version of the sidecars and tables; a change makes every cached file stale."""
BLOCK = 512
"""Tars are made of blocks of 512 bytes."""
IMAGE, TXT, JSON, JSONL = range(4)
"""Kinds of members, and their columns in a scan."""
KINDS = {
    b"jpg": IMAGE,
    b"jpeg": IMAGE,
    b"png": IMAGE,
    b"webp": IMAGE,
    b"bmp": IMAGE,
    b"tif": IMAGE,
    b"tiff": IMAGE,
    b"txt": TXT,
    b"json": JSON,
    b"jsonl": JSONL,
}
"""Known extensions, in lower case; members with others are ignored."""
KIND_NAMES = ("image", ".txt", ".json", ".jsonl")
"""Kinds of members by number, in words."""
NEEDS = {
    Stream.IMAGES: "an image member (.jpg .jpeg .png .webp .bmp .tif .tiff)",
    Stream.TEXTS: "a .txt or .jsonl member",
    Stream.PAIRS: "an image member and a .txt or .json member of the same key",
}
ROW = np.dtype([("shard", "<u4"), ("row", "<u4"), ("image", "<i8", 2), ("text", "<i8", 2), ("kind", "u1")])
"""One sample of a table: number of its shard, its row in the shard's scan, (offset, size) of its members, and the kind
of the text member."""
SCANNERS = 8
"""Threads that scan shards: they wait for storage most of the time."""
PROGRESS_SECONDS = 2.0
"""Time between two progress lines."""


class Share(NamedTuple):
    """Which part of the shards this process works on first, where several make what the cache lacks."""

    number: int = 0
    """Number of the part."""
    parts: int = 1
    """Parts in all: processes with other data."""

    def of(self, shards: int) -> range:
        """Numbers of its shards."""
        return range(shards * self.number // self.parts, shards * (self.number + 1) // self.parts)


ALONE = Share()
"""All of it."""


class DamagedTar(Exception):
    """The rest of this tar cannot be read."""


def is_sequential(pattern: str) -> bool:
    """Whether a pattern names commands or addresses, which are read from front to back, and no files."""
    return re.match(r"pipe:|\w+://", pattern) is not None


def expand(pattern: str, field: str) -> list[str]:
    """Absolute paths of the files that a brace and glob pattern names, sorted, each once.

    Every alternative of the braces must match: a shard missing from a range is an error, not a smaller data set.
    """
    if not pattern:
        raise ValueError(f"{field}: no pattern of tars is given")
    if is_sequential(pattern):
        raise ValueError(f"{field}: {pattern!r} has no random access, which is needed here: name files")
    paths: set[str] = set()
    for part in braceexpand(os.path.expanduser(pattern)):
        # One look at a file that is named: there may be as many as shards times ranks.
        found = [part] if os.path.isfile(part) else [p for p in glob.glob(part, recursive=True) if os.path.isfile(p)]
        if not found:
            hint = f": it is a folder; name its files, as by {part.rstrip('/')}/*.tar" if os.path.isdir(part) else ""
            raise ValueError(f"{field}: no file matches {part!r}{hint}")
        paths.update(map(os.path.abspath, found))
    return sorted(paths)


def fingerprint(path: str) -> tuple[int, int]:
    """Size and time of change: a shard that differs in either is scanned anew."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _number(field: bytes) -> int:
    """A number of a tar header: octal digits, or base 256 where the first bit is set (GNU, from 8 GiB on)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a header block is right; its own eight bytes count as spaces."""
    try:
        return _number(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Records `length key=value` of a POSIX extended header."""
    records = {}
    while data:
        length = int(data.split(b" ", 1)[0])
        key, _, value = data[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        records[key] = value
        data = data[length:]
    return records


def members(file: int, path: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and size of each regular member that lies wholly inside the tar, by its headers alone.

    Raises DamagedTar where the tar is cut or a header is broken, after all members before that place;
    ValueError if the file is no plain tar at all.
    """
    return headers(lambda offset, size: os.pread(file, size, offset), os.fstat(file).st_size, path)


def headers(read: Callable[[int, int], bytes], end: float, path: str) -> Iterator[tuple[bytes, int, int]]:
    """`members` of whatever `read(offset, size)` reads, at offsets that only grow; `end` is infinite if not known, and
    then the last member may not be whole."""
    at = 0
    extended: dict[bytes, bytes] = {}
    while True:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar(f"cut at byte {min(end, at + len(header))}: the end-of-archive block is missing")
        if not any(header):
            return
        if not _is_header(header):
            if at == 0:
                raise ValueError(
                    f"{path} is not a plain tar; of compressed ones, .tar.gz and .tgz are unpacked into data.cache"
                )
            raise DamagedTar(f"broken member header at byte {at}")
        kind, data = header[156:157], at + BLOCK
        size = int(extended.get(b"size", _number(header[124:136])))
        if data + size > end:
            raise DamagedTar(f"cut at byte {end}: the member at byte {at} is not whole")
        at = data + -(-size // BLOCK) * BLOCK
        if kind == b"x":
            try:
                extended.update(_pax_records(_whole(read(data, size), size, data)))
            except (ValueError, IndexError):
                raise DamagedTar(f"broken extended header at byte {data}") from None
        elif kind == b"L":
            extended[b"path"] = _whole(read(data, size), size, data).rstrip(b"\0")
        elif kind not in b"gK":
            if kind in b"0\0":
                name = header[:100].rstrip(b"\0")
                if header[257:263] == b"ustar\0" and header[345]:
                    name = header[345:500].rstrip(b"\0") + b"/" + name
                yield extended.get(b"path", name), data, size
            extended = {}


def _whole(data: bytes, size: int, at: int) -> bytes:
    if len(data) < size:
        raise DamagedTar(f"cut at byte {at + len(data)}: the extended header at byte {at} is not whole")
    return data


def key_and_kind(name: bytes) -> tuple[bytes, int | None]:
    """A member's key, its path without the last extension, and its kind; None if it is of no known kind."""
    key, _, extension = name.rpartition(b".")
    # "._name" files hold a Mac's file attributes, whatever their extension says.
    return key, None if name.rpartition(b"/")[2].startswith(b"._") else KINDS.get(extension.lower())


@dataclass
class Scan:
    """What one shard holds."""

    places: np.ndarray
    """int64 [samples, 4 kinds, 2]: offset and size of each member, size -1 where there is none."""
    keys: np.ndarray
    """uint8: the keys, one after the other."""
    key_ends: np.ndarray
    """int64 [samples]: where each key ends in `keys`."""
    damage: str
    """What is wrong with the tar; empty if nothing."""

    def key(self, row: int) -> str:
        """Key of a sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].tobytes().decode("utf-8", "replace")


def scan(path: str) -> Scan:
    """Reads the headers of one tar and joins its members by key: the member's path without its known extension.

    Raises ValueError where a key has a second member of the same kind: which one belongs to the sample is unknown.
    """
    samples: dict[bytes, list[tuple[int, int]]] = {}
    damage = ""
    with open(path, "rb", buffering=0) as file:
        try:
            for name, offset, size in members(file.fileno(), path):
                key, kind = key_and_kind(name)
                if kind is None:
                    continue
                sample = samples.setdefault(key, [(0, -1)] * 4)
                if sample[kind][1] >= 0:
                    raise ValueError(
                        f"{path}: key {key.decode('utf-8', 'replace')!r} has a second {KIND_NAMES[kind]} member"
                    )
                sample[kind] = (offset, size)
        except DamagedTar as error:
            damage = str(error)
    return Scan(
        np.array(list(samples.values()), dtype=np.int64).reshape(-1, 4, 2),
        np.frombuffer(b"".join(samples), dtype=np.uint8),
        np.cumsum([len(key) for key in samples], dtype=np.int64),
        damage,
    )


def sidecar_path(path: str, folder: Path) -> Path:
    """Cache file of a shard's scan."""
    return folder / f"{digest(path)}.npz"


def shard_scan(path: str, mark: tuple[int, int], folder: Path) -> Scan:
    """The shard's scan, from its sidecar if that was made from this very file, else made now."""
    sidecar = sidecar_path(path, folder)
    expected = np.array([FORMAT, *mark], dtype=np.int64)
    try:
        with np.load(sidecar, allow_pickle=False) as stored:
            if np.array_equal(stored["mark"], expected):
                return Scan(stored["places"], stored["keys"], stored["key_ends"], str(stored["damage"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # There is none yet, or it is of no use: it is only a cache.
    result = scan(path)
    if fingerprint(path) != mark:
        raise ValueError(f"{path} changed while it was indexed; start again when it is complete")
    write_whole(
        sidecar,
        lambda file: np.savez(
            file,
            mark=expected,
            places=result.places,
            keys=result.keys,
            key_ends=result.key_ends,
            damage=np.array(result.damage),
        ),
    )
    return result


def _rows(shard: int, places: np.ndarray, stream: Stream) -> tuple[np.ndarray, int]:
    """The usable samples of a shard's scan, and the number of keys that lack a needed member."""
    present = places[:, :, 1] >= 0
    if stream is Stream.TEXTS:
        row, column = np.nonzero(present[:, [TXT, JSONL]])
        kind = np.array([TXT, JSONL])[column]
        complete = present[:, TXT] | present[:, JSONL]
    else:
        complete = present[:, IMAGE]
        if stream is Stream.PAIRS:
            complete = complete & (present[:, TXT] | present[:, JSON])
        row = np.flatnonzero(complete)
        kind = np.where(present[row, TXT], TXT, JSON)
    rows = np.zeros(len(row), dtype=ROW)
    rows["shard"], rows["row"], rows["kind"] = shard, row, kind
    rows["image"], rows["text"] = places[row, IMAGE], places[row, kind]
    return rows, int(np.count_nonzero(~complete))


@dataclass
class Table:
    """The samples of one source: a memory-mapped file, opened anew in each process."""

    paths: list[str]
    """Its shards, as the user named them."""
    files: list[str]
    """The plain tars that are read: the shards themselves, or the unpacked copies of compressed ones."""
    marks: list[tuple[int, int]]
    """Fingerprints of the files."""
    stream: Stream
    """The stream it serves."""
    file: Path
    """The table file."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rows(self) -> np.ndarray:
        """ROW records of all samples, shard by shard."""
        # A plain array over the mapped pages: np.memmap itself costs more than the reading of a row.
        return np.load(self.file, mmap_mode="r", allow_pickle=False).view(np.ndarray)

    @property
    def notes(self) -> dict:
        """damage: pairs of shard and reason; incomplete: samples left out because a member is missing."""
        return json.loads(self.file.with_suffix(".json").read_text())

    def shard(self, index: int) -> str:
        """Path of the shard that holds a sample."""
        return self.paths[self.rows[index]["shard"]]

    def key(self, index: int) -> str:
        """Key of a sample, looked up in the sidecar: it is needed for reports only."""
        number, row = self.rows[index]["shard"], self.rows[index]["row"]
        return shard_scan(self.files[number], self.marks[number], self.file.parent).key(int(row))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}


def open_table(pattern: str, field: str, stream: Stream, cache: str, share: Share = ALONE) -> Table:
    """The table of the samples that a pattern of tars holds, built if the cache has none for these very files: every
    process scans its share of the shards, then one of them what is missing yet.

    Raises ValueError naming `field` where nothing matches or no shard holds a usable sample.
    """
    folder = cache_folder(cache)
    paths = expand(pattern, field)
    with ThreadPoolExecutor(SCANNERS) as pool:
        files = list(pool.map(lambda path: plain_tar(path, folder), paths))
        marks = list(pool.map(fingerprint, files))
    name = digest(FORMAT, stream.name, *zip(paths, marks, strict=True))
    table = Table(paths, files, marks, stream, folder / f"{name}.npy")
    if not table.file.exists():
        if share != ALONE:
            _scan_share(table, share)
        with locked(folder / digest(*paths)):
            if not table.file.exists():
                _build(table)
    if len(table) == 0:
        raise ValueError(f"{field}: no sample in {len(paths)} shard(s) of {pattern!r}: each needs {NEEDS[stream]}")
    return table


def _scan_share(table: Table, share: Share) -> None:
    """Makes the sidecars of this process's share that are missing."""
    folder = table.file.parent

    def make(number: int) -> None:
        shard_scan(table.files[number], table.marks[number], folder)

    own = share.of(len(table.files))
    with ThreadPoolExecutor(SCANNERS) as pool:
        for _ in _with_progress(pool.map(make, own), table.stream, len(own)):
            pass  # Nothing but errors comes back.


def _build(table: Table) -> None:
    """Scans what is not scanned yet and writes the merged table, which is in memory once; no scan is."""
    folder = table.file.parent
    parts, damage, incomplete = [], [], 0

    def rows_of(number: int) -> tuple[np.ndarray, int, str]:
        found = shard_scan(table.files[number], table.marks[number], folder)
        return *_rows(number, found.places, table.stream), found.damage

    with ThreadPoolExecutor(SCANNERS) as pool:
        results = _with_progress(pool.map(rows_of, range(len(table.files))), table.stream, len(table.files))
        for path, (rows, lacking, problem) in zip(table.paths, results, strict=True):
            parts.append(rows)
            incomplete += lacking
            if problem:
                damage.append((path, problem))
    notes = json.dumps({"damage": damage, "incomplete": incomplete}).encode()
    write_whole(table.file.with_suffix(".json"), lambda file: file.write(notes))
    write_whole(table.file, lambda file: _save(file, parts))


def _with_progress(results: Iterable[Result], stream: Stream, shards: int) -> Iterator[Result]:
    """The results of so many shards, and now and then a line that tells how many there are."""
    told = time.monotonic()
    for done, result in enumerate(results, start=1):
        yield result
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("indexing %s: %d of %d shards", stream.name.lower(), done, shards)


def _save(file: BinaryIO, parts: list[np.ndarray]) -> None:
    """np.save of the parts' concatenation, which is never in memory."""
    header = {"descr": dtype_to_descr(ROW), "fortran_order": False, "shape": (sum(map(len, parts)),)}
    write_array_header_1_0(file, header)
    for part in parts:
        file.write(part.data)
