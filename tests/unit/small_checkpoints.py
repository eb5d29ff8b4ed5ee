"""Checkpoints of three small tensors for the tests of the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from beit3_dist.checkpoint import read, store
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.store import Store, TrainState
from beit3_dist.config import ModelConfig

MODEL = ModelConfig(layers=2, width=8, heads=2, ffn_width=12, vl_expert_layers=1)
STATE = TrainState(
    step=7,
    consumed={"images": 70, "texts": 14, "pairs": 21},
    bad_samples=3,
    sources={"seed": 0, "data.images": {"shards": 2}},
)
SHAPES = {"a.weight": (3, 5), "a.bias": (5,), "single": (1,)}
SUFFIXES = ("", "/exp_avg", "/exp_avg_sq")


def whole(name: str, suffix: str) -> torch.Tensor:
    """The value of a tensor, flattened."""
    first = 100 * list(SHAPES).index(name) + 1000 * SUFFIXES.index(suffix)
    return torch.arange(first, first + torch.Size(SHAPES[name]).numel(), dtype=torch.float32)


def pieces(rank: int, world: int, empty: bool = False) -> list[Shard]:
    """What a rank holds when everything is cut into equal parts, the last one shorter or without anything, as ZeRO
    does; `empty`: with zeros in place of the values."""
    held = []
    for name, shape in SHAPES.items():
        total = torch.Size(shape).numel()
        part = -(-total // world)
        start, end = min(rank * part, total), min((rank + 1) * part, total)
        tensors = {suffix: whole(name, suffix)[start:end].clone() for suffix in SUFFIXES}
        if empty:
            tensors = {suffix: torch.zeros_like(value) for suffix, value in tensors.items()}
        held.append(Shard(name, shape, start, tensors))
    return held


def open_store(folder: Path, keep: int = 0, keep_every: int = 0, start: int = 0) -> Store:
    return Store(folder, torch.device("cpu"), keep, keep_every, start)


def begin(to: Store, step: int = 7, rank: int = 0, world: int = 1) -> None:
    """Begins to save a rank's pieces."""
    to.save(pieces(rank, world), replace(STATE, step=step), MODEL, "out: x\n", {"torch": "1"})


def save(folder: Path, step: int = 7, rank: int = 0, world: int = 1, keep: int = 0, keep_every: int = 0) -> Path:
    """A finished checkpoint of a run that has gone on a step before, whose steps were finite."""
    to = open_store(folder, keep, keep_every, start=step - 1)
    begin(to, step, rank, world)
    to.wait()
    return folder / store.step_name(step)


def load(path: Path, rank: int = 0, world: int = 1) -> None:
    """Loads into zeros and compares with the values."""
    target = pieces(rank, world, empty=True)
    read.load(path, target)
    for piece, expected in zip(target, pieces(rank, world), strict=True):
        for suffix in SUFFIXES:
            assert torch.equal(piece.tensors[suffix], expected.tensors[suffix]), piece.name + suffix


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "group"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
