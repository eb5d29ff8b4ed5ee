"""Which file of a checkpoint holds which elements of which parameter, and a digest of each piece of it.

A rank that goes on in another layout, or starts from a checkpoint's weights, needs a few files of a thousand. The
index, tensors.json beside the manifest, tells which, so that nobody opens a file to find out what is in it, and nobody
reads more of it than it uses to know that this is what was saved:

    chunk      bytes of the pieces of a file that have a digest each; the last piece is shorter
    chunks     file -> SHA-256 of its pieces
    suffixes   lists of what is stored under a parameter's name: "", "/exp_avg", ...
    tensors    parameter -> shape, and runs of files that hold equal shares of it in even steps, as ZeRO cuts them

Its size does not depend on the number of files but by their digests: a thousand ranks' shares are one run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, NamedTuple

from beit3_dist.model.cut import Cut
from beit3_dist.opening import parse_json

INDEX = "tensors.json"
CHUNK = 1 << 18
"""Bytes (256 KiB). Of each file that is open, one piece is in memory."""
MOST_INDEX = 1 << 28
"""Bytes of the largest index: that of 23 GB has six million."""


class Held(NamedTuple):
    """A shard in a file, as its header tells of it."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    cut: Cut | None
    suffixes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """Files number `first`, `first` + `every`, ..., `files` in all, of which each holds the `numel` elements of a
    flattened parameter, or of a part of it, that begin `step` behind those of the one before it."""

    first: int
    files: int
    every: int
    start: int
    step: int
    numel: int
    cut: Cut | None
    suffixes: tuple[str, ...]

    def within(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Number of the file, and first element, of the shards with some of the elements [begin, end)."""
        low, high = 0, self.files
        if self.step > 0:  # else it is a single one
            low, high = max(low, (begin - self.start - self.numel) // self.step + 1), min(high, self._before(end))
        for place in range(low, high):
            start = self.start + place * self.step
            if start < end and begin < start + self.numel:
                yield self.first + place * self.every, start

    def _before(self, end: int) -> int:
        return -((self.start - end) // self.step)

    def and_more(self, file: int, held: Held) -> Run | None:
        """This run with a shard behind it; None: it does not go on evenly."""
        if (held.numel, held.cut, held.suffixes) != (self.numel, self.cut, self.suffixes):
            return None
        if self.files == 1 and file > self.first and held.start > self.start:
            return replace(self, files=2, every=file - self.first, step=held.start - self.start)
        is_next = file == self.first + self.files * self.every and held.start == self.start + self.files * self.step
        return replace(self, files=self.files + 1) if is_next and self.files > 1 else None


def runs_of(files: Iterable[tuple[int, Sequence[Held]]]) -> dict[str, tuple[tuple[int, ...], list[Run]]]:
    """Parameter -> its shape and runs, from what each file holds by its number. Raises ValueError where two differ in a
    shape."""
    found: dict[str, tuple[tuple[int, ...], list[Run]]] = {}
    last: dict[tuple[str, Cut | None], int] = {}
    for file, shards in files:
        for held in shards:
            shape, runs = found.setdefault(held.name, (held.shape, []))
            if held.shape != shape:
                raise ValueError(f"{held.name} has shape {list(shape)} in one file and {list(held.shape)} in another")
            place = last.get((held.name, held.cut))
            longer = None if place is None else runs[place].and_more(file, held)
            if place is not None and longer is not None:
                runs[place] = longer
            else:
                last[held.name, held.cut] = len(runs)
                runs.append(Run(file, 1, 1, held.start, 0, held.numel, held.cut, held.suffixes))
    return found


def chunk_digests(parts: Sequence[bytes | memoryview], chunk: int = CHUNK) -> list[str]:
    """SHA-256 of each piece of a file that consists of these parts."""
    digests, sha, room = [], hashlib.sha256(), chunk
    for part in parts:
        content = memoryview(part).cast("B")
        while content:
            sha.update(content[:room])
            content, room = content[room:], room - min(room, len(content))
            if not room:
                digests.append(sha.hexdigest())
                sha, room = hashlib.sha256(), chunk
    return [*digests, sha.hexdigest()] if room < chunk else digests


def index_text(runs: Mapping[str, tuple[tuple[int, ...], list[Run]]], chunks: Mapping[str, list[str]]) -> str:
    """The content of tensors.json."""
    suffixes = list(dict.fromkeys(run.suffixes for _, some in runs.values() for run in some))
    tensors = {
        name: {
            "shape": shape,
            "runs": [
                {**asdict(run), "cut": run.cut and astuple(run.cut), "suffixes": suffixes.index(run.suffixes)}
                for run in some
            ],
        }
        for name, (shape, some) in runs.items()
    }
    return json.dumps({"chunk": CHUNK, "chunks": chunks, "suffixes": suffixes, "tensors": tensors}) + "\n"


@dataclass(frozen=True)
class TensorIndex:
    """What tensors.json says."""

    chunk: int
    chunks: dict[str, list[str]]
    tensors: dict[str, tuple[tuple[int, ...], list[Run]]]

    @classmethod
    def read(cls, text: str, sizes: Mapping[str, int]) -> TensorIndex:
        """`sizes`: files of the checkpoint by name, in bytes. Raises ValueError where the text is no index of them, so
        that nobody makes room for what it only claims."""
        try:
            content = parse_json(text)
            chunk, chunks = content["chunk"], content["chunks"]
            if not _are_counts(chunk) or not chunk:
                raise ValueError(f"its pieces are of {chunk!r} bytes")
            for name, digests in chunks.items():
                if len(digests) != -(-sizes[name] // chunk):
                    raise ValueError(f"its digests are not those of {name}")
            most = max((sizes[name] for name in chunks), default=0) // 4
            suffixes = [tuple(map(str, some)) for some in content["suffixes"]]
            tensors = {
                name: _tensor(name, fields["shape"], fields["runs"], suffixes, len(chunks), most)
                for name, fields in content["tensors"].items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"it does not tell what the files hold ({reason})") from None
        return cls(chunk, chunks, tensors)


def _tensor(
    name: str, shape: list[int], runs: list[dict[str, Any]], suffixes: list[tuple[str, ...]], files: int, most: int
) -> tuple[tuple[int, ...], list[Run]]:
    found = []
    for fields in runs:
        cut = fields["cut"] and Cut(*fields["cut"])
        run = Run(**fields | {"cut": cut, "suffixes": suffixes[fields["suffixes"]]})
        counts = run.first, run.files, run.every, run.start, run.step, run.numel
        if not _are_counts(*counts, *shape) or not run.files or run.files > files or run.numel > most or 0 in shape:
            raise ValueError(f"a run of {name} is {run}")
        if cut and not (_are_counts(*astuple(cut)) and cut.dimension < len(shape) and cut.part < cut.parts):
            raise ValueError(f"{name} is cut in a way that cannot be: {cut}")
        whole = math.prod(cut.shape(tuple(shape)) if cut else shape)
        if run.start + (run.files - 1) * run.step + run.numel > whole or (run.files > 1 and run.step < run.numel):
            raise ValueError(f"a run of {name}, of shape {shape}, is {run}")
        found.append(run)
    return tuple(shape), found


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
