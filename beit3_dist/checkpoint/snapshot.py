"""A rank's shards in host memory: one copy of the tensors while the training waits, the file while it goes on.

The file is written here and not by safetensors' own writer, which copies every tensor once more and holds Python's
lock meanwhile: a thread that writes would stop the training's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.checkpoint.files import write_hashed
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.tensor_index import Held, chunk_digests

ALIGNMENT = 8
"""Bytes that the tensors' place in a safetensors file is a multiple of."""


class Snapshot:
    """One rank's shards as they were when last taken. The memory is used again; on CUDA it is pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.held: list[Held] = []
        """What the file holds; another list where it has changed."""
        self._header = shard_header([], {})
        self._values = torch.empty(0)
        self._places: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def take(self, shards: Iterable[Shard]) -> None:
        """Copies the shards; when it returns they may change."""
        held = [shard for shard in shards if shard.numel]
        described = [
            Held(shard.name, tuple(shard.shape), shard.start, shard.numel, shard.cut, tuple(shard.tensors))
            for shard in held
        ]
        tensors = [values for shard in held for values in shard.tensors.values()]
        sizes = [values.numel() for values in tensors]
        if described != self.held or sizes != [len(place) for place in self._places]:  # at a run's first save
            names = [shard.name + suffix for shard in held for suffix in shard.tensors]
            self._header = shard_header(held, dict(zip(names, sizes, strict=True)))
            self._values = torch.empty(sum(sizes), pin_memory=self._device.type == "cuda")
            self._places, self.held = self._values.split(sizes), described
        for place, values in zip(self._places, tensors, strict=True):
            place.copy_(values, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def write(self, path: Path) -> tuple[dict[str, Any], list[str]]:
        """Writes and syncs the file; its entry in the manifest, and the digests of its pieces."""
        parts: list[bytes | memoryview] = [self._header, self._values.numpy().data]
        with ThreadPoolExecutor(1) as hashing:
            pieces = hashing.submit(chunk_digests, parts)
            return write_hashed(path, parts), pieces.result()


def shard_header(shards: list[Shard], sizes: dict[str, int]) -> bytes:
    """The head of a safetensors file of float32 tensors that lie one after the other."""
    places = {
        shard.name: {"start": shard.start, "shape": shard.shape, "cut": shard.cut and asdict(shard.cut)}
        for shard in shards
    }
    ends = list(accumulate((4 * size for size in sizes.values()), initial=0))
    content: dict[str, Any] = {"__metadata__": {"fragments": json.dumps(places)}}
    for (name, size), begin, end in zip(sizes.items(), ends[:-1], ends[1:], strict=True):
        content[name] = {"dtype": "F32", "shape": [size], "data_offsets": [begin, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
