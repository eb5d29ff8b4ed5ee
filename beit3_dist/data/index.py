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
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from braceexpand import braceexpand
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from beit3_dist.config import require
from beit3_dist.data.cache import DamagedCache, cache_folder, cached, digest, mapped, parsed, write_whole
from beit3_dist.data.kinds import IMAGE, IMAGE_EXTENSIONS, JSON, JSONL, KIND_NAMES, TXT, LeftOut
from beit3_dist.data.members import members_of
from beit3_dist.data.order import Stream
from beit3_dist.data.tars import Tar
from beit3_dist.data.unpack import plain_tar
from beit3_dist.looking import of_node
from beit3_dist.opening import blaming

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FORMAT = 2
"""Version of the sidecars and tables; a change makes every cached file stale."""
NEEDS = {
    Stream.IMAGES: f"an image member (.{' .'.join(IMAGE_EXTENSIONS)})",
    Stream.TEXTS: "a .txt or .jsonl member",
    Stream.PAIRS: "an image member and a .txt or .json member of the same key",
}
ROW = np.dtype([("shard", "<u4"), ("row", "<u4"), ("image", "<i8", 2), ("text", "<i8", 2), ("kind", "u1")])
"""One sample of a table: number of its shard, its row in the shard's scan, (offset, size) of its members, and the kind
of the text member."""
SCANNERS = 8
"""Threads that scan shards: they wait for storage most of the time."""
BATCH = 256
"""Shards at most that a thread looks at in one go."""
PROGRESS_SECONDS = 2.0


class Share(NamedTuple):
    """Which part of the shards this process works on first, where several make what the cache lacks."""

    number: int = 0
    parts: int = 1
    """Parts in all: processes with other data."""

    def of(self, shards: int) -> range:
        return range(shards * self.number // self.parts, shards * (self.number + 1) // self.parts)


ALONE = Share()


def is_sequential(pattern: str) -> bool:
    """Whether a pattern names commands or addresses, which are read from front to back, and no files."""
    return re.match(r"pipe:|\w+://", pattern) is not None


def expand(pattern: str, field: str) -> list[str]:
    """Absolute paths of the files that a brace and glob pattern names, sorted, each once. Every alternative of the
    braces must match: a shard missing from a range is an error, not a smaller data set."""
    require(bool(pattern), f"{field}: no pattern of tars is given")
    require(not is_sequential(pattern), f"{field}: {pattern!r} has no random access, which is needed here: name files")
    paths: set[str] = set()
    with blaming(f"{field}: {pattern!r} is no pattern"):
        parts = list(braceexpand(os.path.expanduser(pattern)))
    for part in parts:
        # One look at a file that is named: there may be as many as shards times ranks.
        if stat.S_ISREG(mode := _mode(part)):
            paths.add(os.path.abspath(part))
            continue
        inside = _matching(part)
        found = {path: _mode(path) for path in inside if "__MACOSX" in part or "__MACOSX" not in path}
        for path, kind in found.items():
            if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise ValueError(f"{field}: {path!r} is a link to nothing, a FIFO or a device; only files are read")
        files = [path for path, kind in found.items() if stat.S_ISREG(kind) and not _of_shard(path)]
        for path in files:
            if path.endswith(".parquet"):
                raise ValueError(
                    f"{field}: {path} is a table and no tar: tools/build_shards.py parquet makes tars of one with "
                    "pictures, img2dataset of one with addresses alone, as LAION's is"
                )
        if not files:
            hint = f": it is a folder; name its files, as by {part.rstrip('/')}/*.tar" if stat.S_ISDIR(mode) else ""
            raise ValueError(f"{field}: no file matches {part!r}{hint}")
        paths.update(map(os.path.abspath, files))
    return sorted(paths)


def _matching(pattern: str) -> list[str]:
    """What a glob pattern names. Folders that exist as they are written are meant so (`run[1]/*.tar`), and brackets
    stand for themselves where nothing matches otherwise (`run[1]-*.tar`)."""
    names = pattern.split("/")
    there = next(n for n in range(len(names), -1, -1) if n == 0 or os.path.exists("/".join(names[:n]) or "/"))
    start, rest = [glob.escape(name) for name in names[:there]], names[there:]
    found = glob.glob("/".join(start + rest), recursive=True)
    return found or glob.glob("/".join(start + [name.replace("[", "[[]") for name in rest]), recursive=True)


def _of_shard(path: str) -> bool:
    """Whether a file is what img2dataset writes beside a shard: NNNNN.parquet and NNNNN_stats.json of NNNNN.tar. All
    that is in the former of the shard's samples is in their .json members, too."""
    stem = next((path.removesuffix(end) for end in (".parquet", "_stats.json") if path.endswith(end)), "")
    return bool(stem) and os.path.isfile(f"{stem}.tar")


def _mode(path: str) -> int:
    """Type of what lies there; 0 if nothing does."""
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return 0


def fingerprint(path: str) -> tuple[int, int]:
    """Size and time of change: a shard that differs in either is scanned anew."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


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
    left_out: LeftOut = field(default_factory=dict)
    """Members that count for no sample, hidden ones apart."""

    def key(self, row: int) -> str:
        return self.raw_key(row).decode("utf-8", "replace")

    def raw_key(self, row: int) -> bytes:
        """The same as it lies in the tar."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].tobytes()


def scan(path: str) -> Scan:
    """Reads the headers of one tar and joins its members by key: the member's path without its known extension. Raises
    ValueError where a key has a second member of the same kind: which one belongs to the sample is unknown."""
    with Tar(path) as tar:
        found = members_of(tar)
    for key, kind in found.seconds:
        raise ValueError(f"{path}: key {key.decode('utf-8', 'replace')!r} has a second {KIND_NAMES[kind]} member")
    return Scan(
        np.array(list(found.samples.values()), dtype=np.int64).reshape(-1, 4, 2),
        np.frombuffer(b"".join(found.samples), dtype=np.uint8),
        np.cumsum([len(key) for key in found.samples], dtype=np.int64),
        found.damage,
        found.left_out,
    )


def sidecar_path(path: str, folder: Path) -> Path:
    return folder / f"{digest(path)}.npz"


def shard_scan(path: str, mark: tuple[int, int], folder: Path) -> Scan:
    """The shard's scan, from its sidecar if that was made from this very file, else made now."""
    sidecar = sidecar_path(path, folder)
    expected = np.array([FORMAT, *mark], dtype=np.int64)
    try:
        with np.load(sidecar, allow_pickle=False) as stored:
            if np.array_equal(stored["mark"], expected):
                left_out = json.loads(str(stored["left_out"]))
                return Scan(stored["places"], stored["keys"], stored["key_ends"], str(stored["damage"]), left_out)
    except Exception:  # noqa: S110 (there is none yet, or it is damaged, which makes numpy raise nearly anything)
        pass
    result = scan(path)
    require(fingerprint(path) == mark, f"{path} changed while it was indexed; start again when it is complete")
    content = vars(result) | {"left_out": json.dumps(result.left_out), "mark": expected}
    write_whole(sidecar, lambda file: np.savez(file, **content))
    return result


def _rows(shard: int, found: Scan, stream: Stream, json_first: bool = False) -> tuple[np.ndarray, LeftOut]:
    """The usable samples of a shard's scan, and the keys that lack a needed member."""
    places = found.places
    present = places[:, :, 1] >= 0
    written = (TXT, JSONL) if stream is Stream.TEXTS else (TXT, JSON)
    has_text = present[:, written].any(axis=1)
    lacking: LeftOut = {}
    complete = np.ones(len(places), dtype=bool)
    for needed, has, what in (
        (stream is not Stream.TEXTS, present[:, IMAGE], "no image member"),
        (stream is not Stream.IMAGES, has_text, f"no {' or '.join(KIND_NAMES[kind] for kind in written)} member"),
    ):
        if needed and not has.all():
            without = np.flatnonzero(complete & ~has)
            complete &= has
            if len(without):
                lacking[what] = len(without), found.key(int(without[0]))
    if stream is Stream.TEXTS:
        row, column = np.nonzero(present[:, written])
        kind = np.array(written)[column]
    else:
        row = np.flatnonzero(complete)
        first, second = (JSON, TXT) if json_first else (TXT, JSON)
        kind = np.where(present[row, first], first, second)
    rows = np.zeros(len(row), dtype=ROW)
    rows["shard"], rows["row"], rows["kind"] = shard, row, kind
    rows["image"], rows["text"] = places[row, IMAGE], places[row, kind]
    return rows, lacking


@dataclass
class Table:
    """The samples of one source: a memory-mapped file, opened anew in each process."""

    paths: list[str]
    """Its shards, as the user named them."""
    files: list[str]
    """The plain tars that are read: the shards themselves, or the unpacked copies of compressed ones."""
    marks: list[tuple[int, int]]
    stream: Stream
    file: Path
    json_first: bool = False
    """Whether a pair's text is its .json member where there is a .txt, too."""
    _looked_up: tuple[int, Scan] | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rows(self) -> np.ndarray:
        """ROW records of all samples, shard by shard."""
        return mapped(self.file, "table", lambda rows: rows.dtype == ROW and rows.ndim == 1)

    @property
    def notes(self) -> dict:
        """damage: pairs of shard and reason. left_out: pairs of shard and, by reason, the number of members or samples
        that are left out there and the name of the first."""
        notes = parsed(self.file.with_suffix(".json"))
        if not isinstance(notes, dict) or notes.keys() != {"damage", "left_out"}:
            raise DamagedCache(f"{self.file.with_suffix('.json')} is damaged: it holds no notes")
        return notes

    def shard(self, index: int) -> str:
        return self.paths[self.rows[index]["shard"]]

    def key(self, index: int) -> str:
        """Key of a sample, looked up in the sidecar, which has those of a whole shard: it is needed for reports only.
        The sidecar of the last shard is kept for a neighbour."""
        number, row = int(self.rows[index]["shard"]), int(self.rows[index]["row"])
        if self._looked_up is None or self._looked_up[0] != number:
            self._looked_up = number, _scan(self, number)
        return self._looked_up[1].key(row)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "rows"} | {"_looked_up": None}


def open_table(
    pattern: str, field: str, stream: Stream, cache: str, share: Share = ALONE, json_first: bool = False
) -> Table:
    """The table of the samples that a pattern of tars holds, built if the cache has none for these very files: one
    process of a node looks which there are, every process scans its share of the shards, then the one what is missing
    yet. Raises ValueError naming `field` where nothing matches or no shard holds a usable sample."""
    table, is_made = _found(pattern, field, stream, cache, json_first)
    if not is_made and share != ALONE:
        _scan_share(table, share)
    samples = of_node(lambda: _made(table))
    shards = len(table.paths)
    require(samples != 0, f"{field}: no sample in {shards} shard(s) of {pattern!r}: each needs {NEEDS[stream]}")
    return table


def _found(pattern: str, field: str, stream: Stream, cache: str, json_first: bool) -> tuple[Table, bool]:
    """The table, of which one process looks for all, and whether the cache has it."""

    def look() -> dict[str, Any]:
        folder = cache_folder(cache)
        paths = expand(pattern, field)
        files = _of_each(lambda path: plain_tar(path, folder), paths)
        marks = _of_each(fingerprint, files)
        kind = f"{stream.name} json first" if json_first else stream.name
        name = digest(FORMAT, kind, *zip(paths, marks, strict=True))
        unpacked = {n: file for n, (file, path) in enumerate(zip(files, paths, strict=True)) if file != path}
        is_made = (folder / f"{name}.npy").exists()
        seen = {"folder": str(folder), "name": name, "made": is_made}
        return seen | {"paths": paths, "marks": marks, "unpacked": unpacked}

    seen = of_node(look)
    paths, marks = seen["paths"], [(size, changed) for size, changed in seen["marks"]]
    files = paths.copy()
    for number, file in seen["unpacked"].items():
        files[int(number)] = file
    return Table(paths, files, marks, stream, Path(seen["folder"], f"{seen['name']}.npy"), json_first), seen["made"]


def _of_each(look: Callable[[str], Result], paths: list[str]) -> list[Result]:
    """What `look` gives of each path, by some threads. To hand a single one to a thread takes longer than the look."""
    size = min(BATCH, -(-len(paths) // SCANNERS))
    batches = [paths[at : at + size] for at in range(0, len(paths), size)]
    with ThreadPoolExecutor(SCANNERS) as pool:
        return [seen for some in pool.map(lambda batch: [look(path) for path in batch], batches) for seen in some]


def _made(table: Table) -> int:
    """Builds a table that the cache lacks; its samples."""
    lock = table.file.parent / digest(*table.paths)
    rows, _ = cached(lambda: (table.rows, table.notes), lambda: _build(table), lock)
    return len(rows)


def _scan(table: Table, number: int) -> Scan:
    """A shard's scan. Raises ValueError that names the shard, not its unpacked copy."""
    file, shard = table.files[number], table.paths[number]
    try:
        return shard_scan(file, table.marks[number], table.file.parent)
    except ValueError as error:
        raise ValueError(str(error).replace(file, shard)) from None


def shard_keys(table: Table, number: int) -> list[bytes]:
    """Keys of the samples that a table has of a shard, in its order."""
    found, rows = _scan(table, number), table.rows
    return [found.raw_key(int(row)) for row in rows["row"][rows["shard"] == number]]


def _scan_share(table: Table, share: Share) -> None:
    """Makes the sidecars of this process's share that are missing."""
    own = share.of(len(table.files))
    with ThreadPoolExecutor(SCANNERS) as pool:
        for _ in _with_progress(pool.map(partial(_scan, table), own), table.stream, len(own)):
            pass  # Only errors are of use.


def _build(table: Table) -> None:
    """Scans what is not scanned yet and writes the merged table, which is in memory once; no scan is."""
    parts, damage, left_out = [], [], []

    def rows_of(number: int) -> tuple[np.ndarray, LeftOut, str]:
        found = _scan(table, number)
        rows, lacking = _rows(number, found, table.stream, table.json_first)
        return rows, lacking | found.left_out, found.damage

    with ThreadPoolExecutor(SCANNERS) as pool:
        results = _with_progress(pool.map(rows_of, range(len(table.files))), table.stream, len(table.files))
        for path, (rows, lost, problem) in zip(table.paths, results, strict=True):
            parts.append(rows)
            if lost:
                left_out.append((path, lost))
            if problem:
                damage.append((path, f"{problem}; what lies before is used"))
            elif not len(rows):
                damage.append((path, "no sample in this shard"))
    notes = json.dumps({"damage": damage, "left_out": left_out}).encode()
    write_whole(table.file.with_suffix(".json"), lambda file: file.write(notes))
    write_whole(table.file, lambda file: _save(file, parts))


def _with_progress(results: Iterable[Result], stream: Stream, shards: int) -> Iterator[Result]:
    """The results of so many shards, and now and then a line that tells how many there are."""
    told = time.monotonic()
    for done, result in enumerate(results, start=1):
        yield result
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("indexing %s: %d of %d shards", stream.field, done, shards)


def _save(file: BinaryIO, parts: list[np.ndarray]) -> None:
    """np.save of the parts' concatenation, which is never in memory."""
    header = {"descr": dtype_to_descr(ROW), "fortran_order": False, "shape": (sum(map(len, parts)),)}
    write_array_header_1_0(file, header)
    for part in parts:
        file.write(part.data)
