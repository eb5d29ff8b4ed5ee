"""Values of a checkpoint, for whatever shards they are asked.

Only the elements that are asked for are read, through buffers of a fixed size: beside its targets, `load` holds no
parameter in memory, however the checkpoint was cut.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit3_dist.checkpoint.find import Damaged, read_manifest, wrong_digests
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.config import require
from beit3_dist.model.cut import Cut
from beit3_dist.opening import open_regular, parse_json
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


def load(path: Path, shards: Iterable[Shard]) -> None:
    """Fills the shards' tensors from a checkpoint that may have been cut into other shards.

    The digests have been verified (`find.verified`). Raises ValueError where elements are missing or not finite.
    """
    stored = StoredShards(path)
    for shard in shards:
        for suffix, target in shard.tensors.items():
            stored.fill(target, shard, suffix)
            require_finite([(shard.name + suffix, target)], str(path))


def read_weights(path: Path, averaged: bool = False) -> dict[str, Tensor]:
    """The whole model of a checkpoint, name -> float32 tensor on the CPU, in one process and without DeepSpeed.

    `averaged`: for use; the moving average of the weights where the checkpoint has one, which a log message says.

    Raises Damaged where a file is not what was saved, ValueError where a weight is not finite.
    """
    if wrong := wrong_digests(path, read_manifest(path)):
        raise Damaged("; ".join(wrong))
    shards, suffix = StoredShards(path), ""
    if averaged and shards.have(AVERAGE):
        suffix = AVERAGE
        log.info("%s: the moving average of its weights is taken", path)
    names = (name for name in shards.names if not name.startswith(OBJECTIVE_STATE))
    weights = {name: shards.whole(name, suffix) for name in names}
    require_finite(weights.items(), str(path))
    return weights


@dataclass(frozen=True)
class _Stored:
    """A shard in a file."""

    file: Path
    start: int
    shape: tuple[int, ...]
    cut: Cut | None
    places: dict[str, int]
    """Stored name of the shard's values -> where they begin in the file, in bytes."""
    numel: int

    def read(self, key: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of the flattened parameter or part, which the shard holds."""
        offset = self.places[key] + 4 * (begin - self.start)
        return torch.from_numpy(np.fromfile(self.file, "<f4", end - begin, offset=offset))


class StoredShards:
    """All shards of a checkpoint by the name of their parameter, read only where they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stored: dict[str, list[_Stored]] = {}
        for file in sorted(path.glob("shard_*.safetensors")):
            for name, shard in _shards_in(file).items():
                self._stored.setdefault(name, []).append(shard)

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def have(self, suffix: str) -> bool:
        """Whether anything is stored under the parameters' names with this suffix."""
        return any(suffix in self.suffixes(name) for name in self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole parameter. Raises ValueError where its elements are fewer, so that nobody makes room for
        what a header only claims."""
        shape, held = self._stored[name][0].shape, sum(shard.numel for shard in self._stored[name])
        require(held >= math.prod(shape), f"{self._path} holds {held} of {math.prod(shape)} elements of {name}")
        return shape

    def suffixes(self, name: str) -> set[str]:
        """What is stored of a parameter: "" for its weights, and those of its moments."""
        return {key.removeprefix(name) for shard in self._stored[name] for key in shard.places}

    def whole(self, name: str, suffix: str) -> Tensor:
        """A whole parameter (or moment), float32 on the CPU."""
        shape = self.shape(name)
        flat = torch.empty(math.prod(shape))
        self.fill(flat, Shard(name, shape, 0, {suffix: flat}), suffix)
        return flat.view(shape)

    def fill(self, target: Tensor, shard: Shard, suffix: str) -> None:
        """Copies the shard's values into `target` [numel]. Raises ValueError where the checkpoint lacks some."""
        stored, key = self._stored.get(shard.name, []), shard.name + suffix
        for other in stored:
            if other.shape != shard.shape:
                raise ValueError(
                    f"{self._path}: {shard.name} has shape {list(other.shape)}, the model needs {list(shard.shape)}"
                )
        theirs = stored[0].cut if stored else shard.cut
        if (theirs and theirs.parts) == (shard.cut and shard.cut.parts):
            self._copy(target, shard.start, [other for other in stored if other.cut == shard.cut], key)
            return
        dimension = (shard.cut or theirs).dimension  # type: ignore[union-attr]  # one of the two is a cut
        if dimension == 0:
            self._fill_rows(target, shard, stored, key)
        else:
            self._fill_columns(target, shard, dimension, stored, key)

    def _fill_rows(self, target: Tensor, shard: Shard, stored: list[_Stored], key: str) -> None:
        """Cut along the first dimension, parts lie one after another in the flattened parameter, padding behind it."""
        begin = _offset(shard.cut, shard.shape) + shard.start
        inside = max(0, min(target.numel(), math.prod(shard.shape) - begin))
        in_whole = [replace(other, start=_offset(other.cut, other.shape) + other.start) for other in stored]
        self._copy(target[:inside], begin, in_whole, key)
        target[inside:].zero_()

    def _fill_columns(self, target: Tensor, shard: Shard, dimension: int, stored: list[_Stored], key: str) -> None:
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
            target[first - begin : last - begin] = self._block(block, mine, columns, stored, key)[inside]

    def _block(self, rows: range, mine: range, columns: int, stored: list[_Stored], key: str) -> Tensor:
        """The columns `mine`, of which those from `columns` on are padding, of some rows; flattened."""
        block = torch.zeros(len(rows), len(mine))
        for cut in dict.fromkeys(other.cut for other in stored):
            strip = _strip(cut, stored[0].shape, math.prod(stored[0].shape) // columns)
            shared = range(max(mine.start, strip.start), min(mine.stop, strip.stop, columns))
            if shared:
                flat = torch.empty(len(rows) * len(strip))
                self._copy(flat, rows.start * len(strip), [other for other in stored if other.cut == cut], key)
                values = flat.view(len(rows), -1)[:, shared.start - strip.start : shared.stop - strip.start]
                block[:, shared.start - mine.start : shared.stop - mine.start] = values
        return block.view(-1)

    def _copy(self, target: Tensor, start: int, stored: list[_Stored], key: str) -> None:
        """Copies elements [start, start + numel) of what the shards, which do not overlap, hold together."""
        found, stop = 0, start + target.numel()
        for shard in stored:
            end = min(stop, shard.start + shard.numel) if key in shard.places else start
            for begin in range(max(start, shard.start), end, BUFFER):
                values = shard.read(key, begin, min(end, begin + BUFFER))
                target[begin - start : begin - start + len(values)].copy_(values)
                found += len(values)
        require(found == target.numel(), f"{self._path} holds {found} of {target.numel()} elements of {key}")


def _shards_in(file: Path) -> dict[str, _Stored]:
    """The shards that the header of a file names, each by its parameter. Raises ValueError where the header and the
    file do not fit: the right digest in a manifest says only that the file is what its writer meant."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        require(8 + length <= min(size, MOST_HEADER), f"{file} is no shard: its header would have {length} bytes")
        text = opened.read(length)
    try:
        header = parse_json(text.decode())
        described = parse_json(header.pop("__metadata__")["fragments"])
        places: dict[str, dict[str, tuple[int, int]]] = {}
        for key, tensor in header.items():
            places.setdefault(key.partition("/")[0], {})[key] = _place(tensor, 8 + length, size)
        shards = {name: _shard(file, name, fields, places.pop(name)) for name, fields in described.items()}
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


def _shard(file: Path, name: str, fields: dict[str, Any], places: dict[str, tuple[int, int]]) -> _Stored:
    """A shard as the header describes it. `places`: of its values, by their stored names."""
    start, shape, numel = fields["start"], tuple(fields["shape"]), places[name][1]
    cut = Cut(**fields["cut"]) if fields["cut"] else None
    if not _are_counts(start, *shape) or 0 in shape:
        raise ValueError(f"{name} starts at {start!r} of a parameter of shape {list(shape)}")
    if cut and not (_are_counts(*astuple(cut)) and cut.dimension < len(shape) and cut.part < cut.parts):
        raise ValueError(f"{name} is cut in a way that cannot be: {cut}")
    if start + numel > math.prod(cut.shape(shape) if cut else shape) or any(n != numel for _, n in places.values()):
        raise ValueError(f"{name} has {numel} elements from {start} on, or a moment others, of shape {list(shape)}")
    return _Stored(file, start, shape, cut, {key: begin for key, (begin, _) in places.items()}, numel)


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
