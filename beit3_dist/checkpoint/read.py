"""Values of a checkpoint, for whatever shards they are asked.

Only the elements that are asked for are read, through buffers of a fixed size, from the files that hold them: beside
its targets, `load` holds no parameter in memory, however the checkpoint was cut.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.checkpoint.find import (
    Damaged,
    read_index,
    read_manifest,
    without_shards,
    wrong_digest,
    wrong_digests,
)
from beit3_dist.checkpoint.fitting import POSITIONS
from beit3_dist.checkpoint.positions import FIRST_PATCH, interpolate_positions
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.tensor_index import INDEX, Held, Run, TensorIndex, runs_of
from beit3_dist.config import require
from beit3_dist.model.cut import Cut
from beit3_dist.opening import open_files_allowed, open_regular, parse_json
from beit3_dist.weights import require_finite

BUFFER = 1 << 22
"""Elements (16 MiB) that are read at a time."""
MOST_HEADER = 100_000_000
"""Bytes of the longest header of a file of shards, as in the safetensors library."""
AVERAGE = "/ema"
"""What is added to the name of a weight whose moving average is meant."""
TEACHER = "/momentum"
"""The same of an average that teaches, and is no better model than the weights."""
OBJECTIVE_STATE = "objective_state."
"""What the names of what objectives keep from step to step begin with, beside parameters."""

log = logging.getLogger(__name__)


def load(path: Path, shards: Iterable[Shard], positive: Collection[str] = ()) -> None:
    """Fills the shards' tensors from a checkpoint that may have been cut into other shards, and may be of another
    resolution: positions and all that belongs to them are resampled then. Collective. `positive`: suffixes of what is
    never negative.

    The digests have been verified (`find.verified`). Raises ValueError where elements are missing or not finite.
    """
    stored = StoredShards(path, index_for_all(path))
    for shard in shards:
        resampled = shard.name == POSITIONS and POSITIONS in stored.names and stored.shape(POSITIONS) != shard.shape
        if resampled:
            before, now = (shape[0] - FIRST_PATCH for shape in (stored.shape(POSITIONS), shard.shape))
            log.warning(
                "%s: %d vision positions are resampled to %d, and their running means with them", path, before, now
            )
        for suffix, target in shard.tensors.items():
            if resampled:
                mode = "bilinear" if suffix in positive else "bicubic"
                table = interpolate_positions(stored.whole(POSITIONS, suffix), math.isqrt(now), mode)
                require(table.shape == shard.shape, f"{path}: {POSITIONS} has width {table.shape[1]}")
                target.copy_(table.flatten()[shard.start : shard.start + shard.numel])
            else:
                stored.fill(target, shard, suffix)
            require_finite([(shard.name + suffix, target)], str(path))


def index_for_all(path: Path) -> TensorIndex | None:
    """The index of a checkpoint without its digests, which the first process reads; None: it has none. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return read_index(path)
    index = read_index(path) if dist.get_rank() == 0 else None
    told = [index and replace(index, chunks={})]
    dist.broadcast_object_list(told)
    return told[0]


def read_weights(path: Path, averaged: bool = False) -> dict[str, Tensor]:
    """The whole model of a checkpoint, name -> float32 tensor on the CPU, in one process and without DeepSpeed.

    `averaged`: for use; the moving average of the weights where the checkpoint has one, which a log message says.

    Raises Damaged where a file is not what was saved, ValueError where a weight is not finite. Where the checkpoint has
    an index, only what is read of its files is compared with its digests.
    """
    entries, index = read_manifest(path), read_index(path)
    # With an index, the shards are compared piece by piece.
    if wrong := wrong_digests(path, entries if index is None else without_shards(entries)):
        raise Damaged("; ".join(wrong))
    shards = StoredShards(path, index, checked=index is not None)
    suffix = shards.of_weights(averaged)
    weights = {name: shards.whole(name, suffix) for name in shards.parameters}
    require_finite(weights.items(), str(path))
    return weights


@dataclass(frozen=True)
class _Stored:
    """A shard in a file."""

    start: int
    shape: tuple[int, ...]
    cut: Cut | None
    places: dict[str, int]
    """Stored name of the shard's values -> where they begin in the file, in bytes."""
    numel: int

    def held(self, name: str) -> Held:
        suffixes = tuple(key.removeprefix(name) for key in self.places)
        return Held(name, self.shape, self.start, self.numel, self.cut, suffixes)


class _File:
    """A file of shards, open while it is read. `digests`: of its pieces of `chunk` bytes, with which they are compared;
    None: it is believed."""

    def __init__(self, path: Path, digests: list[str] | None, chunk: int) -> None:
        self.path, self._digests, self._chunk = path, digests, chunk
        self._file = open_regular(path)
        self._last: tuple[int, bytearray] = -1, bytearray()

    @cached_property
    def shards(self) -> dict[str, _Stored]:
        """By the name of their parameter, as the header tells."""
        return _shards_in(self.path, self.read, os.fstat(self._file.fileno()).st_size)

    def read(self, begin: int, size: int) -> bytearray:
        """Bytes of the file, fewer at its end. Raises Damaged for others than were saved."""
        if self._digests is None:
            content = bytearray(size)
            return content[: os.preadv(self._file.fileno(), [content], begin)]
        content, end = bytearray(), begin + size
        for number in range(begin // self._chunk, -(-end // self._chunk)):
            start = number * self._chunk
            content += self._piece(number, self._digests)[max(0, begin - start) : end - start]
        return content

    def _piece(self, number: int, digests: list[str]) -> bytearray:
        """A piece whose digest is right. The last one is kept, since it may hold many small parameters."""
        if self._last[0] != number:
            content = bytearray(self._chunk)
            content = content[: os.preadv(self._file.fileno(), [content], number * self._chunk)]
            if content and (number >= len(digests) or hashlib.sha256(content).hexdigest() != digests[number]):
                raise Damaged(wrong_digest(self.path))
            self._last = number, content
        return self._last[1]

    def close(self) -> None:
        self._file.close()


class StoredShards:
    """All shards of a checkpoint by the name of their parameter, read only where they are asked for."""

    def __init__(self, path: Path, index: TensorIndex | None = None, checked: bool = False) -> None:
        """`index`: of the checkpoint, of which only files are opened then that hold what is asked for. `checked`: what
        is read is compared with its digests."""
        self._path, self._index, self._checked = path, index, checked and index is not None
        self._open: OrderedDict[int, _File] = OrderedDict()
        # A parameter may lie in all files, and is followed by another that does.
        self._most_open = open_files_allowed() // 2
        self._names = sorted(path.glob("shard_*.safetensors")) if index is None else []
        if index is None:
            files = ((n, [s.held(name) for name, s in self._file(n).shards.items()]) for n in range(len(self._names)))
            self._runs = runs_of(files)
        else:
            self._runs = index.tensors

    @property
    def names(self) -> list[str]:
        return list(self._runs)

    @property
    def parameters(self) -> list[str]:
        """The names but for what objectives keep."""
        return [name for name in self._runs if not name.startswith(OBJECTIVE_STATE)]

    def of_weights(self, averaged: bool) -> str:
        """The suffix of the weights, or, if they are to be `averaged`, that of their moving average, where the
        checkpoint has one."""
        if averaged and self.have(AVERAGE):
            log.info("%s: the moving average of its weights is taken", self._path)
            return AVERAGE
        return ""

    def have(self, suffix: str) -> bool:
        """Whether anything is stored under the parameters' names with this suffix."""
        return any(suffix in self.suffixes(name) for name in self._runs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole parameter. Raises ValueError where its elements are fewer, so that nobody makes room for
        what a header only claims."""
        shape, runs = self._runs[name]
        held = sum(run.files * run.numel for run in runs)
        require(held >= math.prod(shape), f"{self._path} holds {held} of {math.prod(shape)} elements of {name}")
        return shape

    def suffixes(self, name: str) -> set[str]:
        """What is stored of a parameter: "" for its weights, and those of its moments."""
        return {suffix for run in self._runs[name][1] for suffix in run.suffixes}

    def whole(self, name: str, suffix: str) -> Tensor:
        """A whole parameter (or moment), float32 on the CPU."""
        shape = self.shape(name)
        flat = torch.empty(math.prod(shape))
        self.fill(flat, Shard(name, shape, 0, {suffix: flat}), suffix)
        return flat.view(shape)

    def fill(self, target: Tensor, shard: Shard, suffix: str) -> None:
        """Copies the shard's values into `target` [numel]. Raises ValueError where the checkpoint lacks some."""
        shape, runs = self._runs.get(shard.name, (shard.shape, []))
        key = shard.name + suffix
        if shape != tuple(shard.shape):
            raise ValueError(f"{self._path}: {shard.name} has shape {list(shape)}, the model needs {list(shard.shape)}")
        theirs = runs[0].cut if runs else shard.cut
        if (theirs and theirs.parts) == (shard.cut and shard.cut.parts):
            self._copy(target, shard.start, [(0, run) for run in runs if run.cut == shard.cut], key)
            return
        dimension = (shard.cut or theirs).dimension  # type: ignore[union-attr]  # one of the two is a cut
        if dimension == 0:
            self._fill_rows(target, shard, runs, key)
        else:
            self._fill_columns(target, shard, dimension, runs, key)

    def _fill_rows(self, target: Tensor, shard: Shard, runs: list[Run], key: str) -> None:
        """Cut along the first dimension, parts lie one after another in the flattened parameter, padding behind it."""
        begin = _offset(shard.cut, shard.shape) + shard.start
        inside = max(0, min(target.numel(), math.prod(shard.shape) - begin))
        self._copy(target[:inside], begin, [(_offset(run.cut, shard.shape), run) for run in runs], key)
        target[inside:].zero_()

    def _fill_columns(self, target: Tensor, shard: Shard, dimension: int, runs: list[Run], key: str) -> None:
        """Cut along a later dimension, a part holds a strip of the parameter seen as a matrix."""
        rows = math.prod(shard.shape[:dimension])
        columns = math.prod(shard.shape) // rows
        mine = _strip(shard.cut, shard.shape, rows)
        begin, stop = shard.start, shard.start + target.numel()
        at_a_time = max(1, BUFFER // columns)
        for row in range(begin // len(mine), -(-stop // len(mine)), at_a_time):
            block = range(row, min(row + at_a_time, rows))
            first, last = max(begin, block.start * len(mine)), min(stop, block.stop * len(mine))
            inside = slice(first - block.start * len(mine), last - block.start * len(mine))
            target[first - begin : last - begin] = self._block(block, mine, columns, shard.shape, runs, key)[inside]

    def _block(
        self, rows: range, mine: range, columns: int, shape: tuple[int, ...], runs: list[Run], key: str
    ) -> Tensor:
        """The columns `mine`, of which those from `columns` on are padding, of some rows; flattened."""
        block = torch.zeros(len(rows), len(mine))
        for cut in dict.fromkeys(run.cut for run in runs):
            strip = _strip(cut, shape, math.prod(shape) // columns)
            shared = range(max(mine.start, strip.start), min(mine.stop, strip.stop, columns))
            if shared:
                flat = torch.empty(len(rows) * len(strip))
                self._copy(flat, rows.start * len(strip), [(0, run) for run in runs if run.cut == cut], key)
                values = flat.view(len(rows), -1)[:, shared.start - strip.start : shared.stop - strip.start]
                block[:, shared.start - mine.start : shared.stop - mine.start] = values
        return block.view(-1)

    def _copy(self, target: Tensor, start: int, runs: list[tuple[int, Run]], key: str) -> None:
        """Copies elements [start, start + numel) of what the runs, which do not overlap, hold together; each run with
        the place of its first possible element."""
        found, stop = 0, start + target.numel()
        for offset, run in runs:
            for number, first in run.within(start - offset, stop - offset):
                for begin, values in self._values(run, number, first, key, start - offset, stop - offset):
                    target[begin + offset - start : begin + offset - start + len(values)].copy_(values)
                    found += len(values)
        require(found == target.numel(), f"{self._path} holds {found} of {target.numel()} elements of {key}")

    def _values(
        self, run: Run, number: int, first: int, key: str, start: int, stop: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Those elements of [start, stop) that the shard of a run in a file holds, from its element `first` on: where
        each some of them begin, and their values."""
        file = self._file(number)
        shard = file.shards.get(key.partition("/")[0])
        if shard is None or (shard.start, shard.numel, shard.cut) != (first, run.numel, run.cut):
            raise ValueError(f"{file.path} does not hold what {self._path / INDEX} says of {key}")
        if key not in shard.places:
            return
        end = min(stop, first + run.numel)
        for begin in range(max(start, first), end, BUFFER):
            content = file.read(shard.places[key] + 4 * (begin - first), 4 * (min(end, begin + BUFFER) - begin))
            yield begin, torch.from_numpy(np.frombuffer(content, "<f4", len(content) // 4))

    def _file(self, number: int) -> _File:
        """A file by its number."""
        if number not in self._open:
            if self._index is None:
                self._open[number] = _File(self._names[number], None, 0)
            else:
                path = self._path / f"shard_{number:05d}.safetensors"
                digests = self._index.chunks.get(path.name, []) if self._checked else None
                self._open[number] = _File(path, digests, self._index.chunk)
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]


def _shards_in(file: Path, read: Callable[[int, int], bytearray], size: int) -> dict[str, _Stored]:
    """The shards that the header of a file of `size` bytes names, each by its parameter. Raises ValueError where the
    header and the file do not fit: the right digest in a manifest says only that the file is what its writer meant."""
    length = int.from_bytes(read(0, 8), "little")
    require(8 + length <= min(size, MOST_HEADER), f"{file} is no shard: its header would have {length} bytes")
    text = read(8, length)
    try:
        header = parse_json(text.decode())
        described = parse_json(header.pop("__metadata__")["fragments"])
        places: dict[str, dict[str, tuple[int, int]]] = {}
        for key, tensor in header.items():
            places.setdefault(key.partition("/")[0], {})[key] = _place(tensor, 8 + length, size)
        shards = {name: _shard(name, fields, places.pop(name)) for name, fields in described.items()}
        if places:
            raise ValueError(f"{next(iter(places))!r} is no shard of a parameter")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{file} is no shard: its header does not tell what it holds ({reason})") from None
    return shards


def _place(tensor: dict[str, Any], begin: int, size: int) -> tuple[int, int]:
    """Where the values of a tensor begin in a file of `size` bytes, and how many they are. `begin`: of all tensors."""
    (numel,), (first, end) = tensor["shape"], tensor["data_offsets"]
    if tensor["dtype"] != "F32" or not _are_counts(numel, first, end):
        raise ValueError("its tensors are not all rows of float32 numbers")
    if end - first != 4 * numel or begin + end > size:
        raise ValueError(f"bytes {first} to {end} are not {numel} numbers of the file")
    return begin + first, numel


def _shard(name: str, fields: dict[str, Any], places: dict[str, tuple[int, int]]) -> _Stored:
    """A shard as the header describes it. `places`: of its values, by their stored names."""
    start, shape, numel = fields["start"], tuple(fields["shape"]), places[name][1]
    cut = Cut(**fields["cut"]) if fields["cut"] else None
    if not _are_counts(start, *shape) or 0 in shape:
        raise ValueError(f"{name} starts at {start!r} of a parameter of shape {list(shape)}")
    if cut and not (_are_counts(*astuple(cut)) and cut.dimension < len(shape) and cut.part < cut.parts):
        raise ValueError(f"{name} is cut in a way that cannot be: {cut}")
    if start + numel > math.prod(cut.shape(shape) if cut else shape) or any(n != numel for _, n in places.values()):
        raise ValueError(f"{name} has {numel} elements from {start} on, or a moment others, of shape {list(shape)}")
    return _Stored(start, shape, cut, {key: begin for key, (begin, _) in places.items()}, numel)


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _offset(cut: Cut | None, shape: tuple[int, ...]) -> int:
    """Where a part along the first dimension begins in the flattened parameter."""
    return cut.part * math.prod(cut.shape(shape)) if cut else 0


def _strip(cut: Cut | None, shape: tuple[int, ...], rows: int) -> range:
    """Columns of a part along a later dimension in the parameter as a matrix of `rows` rows, padding included."""
    if cut is None:
        return range(math.prod(shape) // rows)
    width = math.prod(cut.shape(shape)) // rows
    return range(cut.part * width, (cut.part + 1) * width)
