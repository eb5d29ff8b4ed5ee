"""Values of a checkpoint, in whatever pieces they are asked for.

Only the elements that are asked for are read, through buffers of a fixed size: beside its targets, `load` holds no
parameter in memory, however the checkpoint was cut.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beit3_dist.checkpoint.find import Damaged, read_manifest, wrong_digests
from beit3_dist.checkpoint.layout import Cut, Piece

BUFFER = 1 << 22
"""Elements (16 MiB) that are read at a time."""
AVERAGE = "/ema"
"""What is added to the name of a weight whose moving average is meant."""

log = logging.getLogger(__name__)


def load(path: Path, pieces: Iterable[Piece]) -> None:
    """Fills the pieces' tensors from a checkpoint that may have been cut into other pieces.

    The digests have been verified (`find.verified`). Raises ValueError where elements are missing.
    """
    shards = Shards(path)
    for piece in pieces:
        for suffix, target in piece.tensors.items():
            shards.fill(target, piece, suffix)


def read_weights(path: Path, averaged: bool = False) -> dict[str, Tensor]:
    """The whole model of a checkpoint, name -> float32 tensor on the CPU, in one process and without DeepSpeed.

    `averaged`: for use; the moving average of the weights where the checkpoint has one, which a log message says.

    Raises Damaged where a file is not what was saved.
    """
    if wrong := wrong_digests(path, read_manifest(path)):
        raise Damaged("; ".join(wrong))
    shards, suffix = Shards(path), ""
    if averaged and shards.have(AVERAGE):
        suffix = AVERAGE
        log.info("%s: the moving average of its weights is taken", path)
    return {name: shards.whole(name, suffix) for name in shards.names}


@dataclass(frozen=True)
class _Stored:
    """A piece in a file."""

    file: Path
    start: int
    shape: tuple[int, ...]
    cut: Cut | None
    places: dict[str, int]
    """Stored name -> where its values begin in the file, in bytes; of all tensors of the file."""
    numel: int

    def read(self, key: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of the flattened parameter or part, which the piece holds."""
        offset = self.places[key] + 4 * (begin - self.start)
        return torch.from_numpy(np.fromfile(self.file, "<f4", end - begin, offset=offset))


class Shards:
    """All pieces of a checkpoint by the name of their parameter, read only where they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stored: dict[str, list[_Stored]] = {}
        for file in sorted(path.glob("shard_*.safetensors")):
            for name, piece in _pieces_in(file):
                self._stored.setdefault(name, []).append(piece)

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return list(self._stored)

    def have(self, suffix: str) -> bool:
        """Whether anything is stored under the parameters' names with this suffix."""
        return any(name + suffix in pieces[0].places for name, pieces in self._stored.items())

    def whole(self, name: str, suffix: str) -> Tensor:
        """A whole parameter (or moment), float32 on the CPU."""
        shape = self._stored[name][0].shape
        flat = torch.empty(math.prod(shape))
        self.fill(flat, Piece(name, shape, 0, {suffix: flat}), suffix)
        return flat.view(shape)

    def fill(self, target: Tensor, piece: Piece, suffix: str) -> None:
        """Copies the piece's values into `target` [numel]. Raises ValueError where the checkpoint lacks some."""
        stored, key = self._stored.get(piece.name, []), piece.name + suffix
        for other in stored:
            if other.shape != piece.shape:
                raise ValueError(
                    f"{self._path}: {piece.name} has shape {list(other.shape)}, the model needs {list(piece.shape)}"
                )
        theirs = stored[0].cut if stored else piece.cut
        if (theirs and theirs.parts) == (piece.cut and piece.cut.parts):
            self._copy(target, piece.start, [other for other in stored if other.cut == piece.cut], key)
            return
        dimension = (piece.cut or theirs).dimension  # type: ignore[union-attr]  # one of the two is a cut
        if dimension == 0:
            self._fill_rows(target, piece, stored, key)
        else:
            self._fill_columns(target, piece, dimension, stored, key)

    def _fill_rows(self, target: Tensor, piece: Piece, stored: list[_Stored], key: str) -> None:
        """Cut along the first dimension, parts lie one after another in the flattened parameter, padding behind it."""
        begin = _offset(piece.cut, piece.shape) + piece.start
        inside = max(0, min(target.numel(), math.prod(piece.shape) - begin))
        in_whole = [replace(other, start=_offset(other.cut, other.shape) + other.start) for other in stored]
        self._copy(target[:inside], begin, in_whole, key)
        target[inside:].zero_()

    def _fill_columns(self, target: Tensor, piece: Piece, dimension: int, stored: list[_Stored], key: str) -> None:
        """Cut along a later dimension, a part holds a strip of the parameter seen as a matrix."""
        rows = math.prod(piece.shape[:dimension])
        columns = math.prod(piece.shape) // rows
        mine = _strip(piece.cut, piece.shape, rows)
        begin, stop = piece.start, piece.start + target.numel()
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
        """Copies elements [start, start + numel) of what the pieces, which do not overlap, hold together."""
        found, stop = 0, start + target.numel()
        for piece in stored:
            end = min(stop, piece.start + piece.numel)
            for begin in range(max(start, piece.start), end, BUFFER):
                values = piece.read(key, begin, min(end, begin + BUFFER))
                target[begin - start : begin - start + len(values)].copy_(values)
                found += len(values)
        if found != target.numel():
            raise ValueError(f"{self._path} holds {found} of {target.numel()} elements of {key}")


def _pieces_in(file: Path) -> list[tuple[str, _Stored]]:
    """The pieces that the header of a shard names."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    pieces = json.loads(header.pop("__metadata__")["fragments"])
    places = {key: 8 + length + tensor["data_offsets"][0] for key, tensor in header.items()}
    stored = []
    for name, place in pieces.items():
        cut = Cut(**place["cut"]) if place["cut"] else None
        numel = header[name]["shape"][0]
        stored.append((name, _Stored(file, place["start"], tuple(place["shape"]), cut, places, numel)))
    return stored


def _offset(cut: Cut | None, shape: tuple[int, ...]) -> int:
    """Where a part along the first dimension begins in the flattened parameter."""
    return cut.part * math.prod(cut.shape(shape)) if cut else 0


def _strip(cut: Cut | None, shape: tuple[int, ...], rows: int) -> range:
    """Columns of a part along a later dimension in the parameter as a matrix of `rows` rows, padding included."""
    if cut is None:
        return range(math.prod(shape) // rows)
    width = math.prod(cut.shape(shape)) // rows
    return range(cut.part * width, (cut.part + 1) * width)
