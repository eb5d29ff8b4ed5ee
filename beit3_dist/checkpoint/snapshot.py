"""A shard in host memory: one copy of the tensors while the training waits, the file while it goes on.

The file is laid out here instead of by safetensors' own writer, which copies every tensor once more and holds Python's
lock meanwhile: a thread that writes would stop the training's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.checkpoint.files import write_hashed
from beit3_dist.checkpoint.layout import Piece

ALIGNMENT = 8
"""Bytes that the tensors' place in a safetensors file is a multiple of."""


class Snapshot:
    """One rank's pieces as they were when last taken. The memory is used again; on CUDA it is pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layout: list[tuple[Any, ...]] = []
        self._header = shard_header([], {})
        self._values = torch.empty(0)
        self._places: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def take(self, pieces: Iterable[Piece]) -> None:
        """Copies the pieces; when it returns they may change."""
        held = [piece for piece in pieces if piece.numel]
        layout = [(piece.name, piece.start, piece.shape, piece.cut, *piece.tensors) for piece in held]
        tensors = [values for piece in held for values in piece.tensors.values()]
        sizes = [values.numel() for values in tensors]
        if layout != self._layout or sizes != [len(place) for place in self._places]:  # at a run's first save
            names = [piece.name + suffix for piece in held for suffix in piece.tensors]
            self._header = shard_header(held, dict(zip(names, sizes, strict=True)))
            self._values = torch.empty(sum(sizes), pin_memory=self._device.type == "cuda")
            self._places, self._layout = self._values.split(sizes), layout
        for place, values in zip(self._places, tensors, strict=True):
            place.copy_(values, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def write(self, path: Path) -> dict[str, Any]:
        """Writes and syncs the shard; its entry in the manifest."""
        return write_hashed(path, [self._header, self._values.numpy().data])


def shard_header(pieces: list[Piece], sizes: dict[str, int]) -> bytes:
    """The head of a safetensors file of float32 tensors that lie one after the other."""
    places = {
        piece.name: {"start": piece.start, "shape": piece.shape, "cut": piece.cut and asdict(piece.cut)}
        for piece in pieces
    }
    ends = list(accumulate((4 * size for size in sizes.values()), initial=0))
    content: dict[str, Any] = {"__metadata__": {"fragments": json.dumps(places)}}
    for (name, size), begin, end in zip(sizes.items(), ends[:-1], ends[1:], strict=True):
        content[name] = {"dtype": "F32", "shape": [size], "data_offsets": [begin, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
