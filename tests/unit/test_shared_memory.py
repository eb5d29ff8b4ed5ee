"""A container's /dev/shm is compared with what the loaders will hold before a run starts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beit3_dist.config import (
    BatchConfig,
    DataConfig,
    EvalConfig,
    LoadingConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run import shared_memory
from beit3_dist.run.preflight import check_loaders
from beit3_dist.run.shared_memory import check_shared_memory, image_bytes

CPU = torch.device("cpu")
PICTURE = 3 * 32**2
"""Bytes."""


def mesh(rank: int, world: int, local_world: int, tensor: int = 1, pipeline: int = 1) -> Mesh:
    return Mesh(rank, world, rank % local_world, local_world, CPU, tensor, pipeline)


def run_config(workers: int, validates: bool = False) -> RunConfig:
    held_out = EvalConfig(every=1, images="i", texts="t", pairs="p") if validates else EvalConfig()
    return RunConfig(
        out="out",
        text_tokenizer="t",
        image_tokenizer="v",
        data=DataConfig(images="i", texts="t", pairs="p", workers=workers, prefetch=3),
        model=ModelConfig(patch_size=8, image_size=32),
        batch=BatchConfig(images=16, texts=16, pairs=16, accumulation=2),
        parallel=ParallelConfig(zero_stage=1),
        eval=held_out,
    )


def room(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=size, f_frsize=1))


def least(monkeypatch: pytest.MonkeyPatch, config: RunConfig, where: Mesh, pictures: int) -> None:
    """Asserts that so many pictures of 32 pixels must fit."""
    room(monkeypatch, pictures * PICTURE)
    check_loaders(config, where)
    room(monkeypatch, pictures * PICTURE - 1)
    with pytest.raises(ValueError, match=r"data.workers=2: .*--shm-size or --ipc=host.*data.workers=0"):
        check_loaders(config, where)


def test_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, three micro-batches ahead each, two in a step, two more on their way; 16 pictures each."""
    least(monkeypatch, run_config(2), mesh(0, 1, 1), pictures=16 * (2 * 3 + 2 + 2))
    least(monkeypatch, run_config(2, validates=True), mesh(0, 1, 1), pictures=16 * (2 * 3 * 2 + 2 + 2))
    least(monkeypatch, run_config(2), mesh(3, 8, 4), pictures=4 * 2 * (2 * 3 + 2 + 2))
    least(monkeypatch, run_config(2), mesh(1, 4, 4, tensor=4), pictures=16 * (2 * 3 + 2 + 2))
    least(monkeypatch, run_config(2), mesh(0, 4, 4, pipeline=4), pictures=2 * 16 * (2 * 3 + 2 + 2))
    room(monkeypatch, 0)
    check_loaders(run_config(0), mesh(0, 1, 1))


def test_own_views_of_the_image_tokenizer_count(monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 16 * 3 * (32**2 + 16**2) * 10)
    check_loaders(run_config(2), mesh(0, 1, 1), view=16)
    with pytest.raises(ValueError, match="may hold"):
        check_loaders(run_config(2), mesh(0, 1, 1), view=17)


def test_every_process_of_the_host_has_loaders_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data = LoadingConfig(workers=2, prefetch=3)
    room(monkeypatch, need := 2 * image_bytes(32) * 8 * (2 * 3 + 1 + 2))
    check_shared_memory(data, mesh(0, 4, 2), 8 * image_bytes(32))
    room(monkeypatch, need - 1)
    with pytest.raises(ValueError, match="the loaders of 2 process"):
        check_shared_memory(data, mesh(0, 4, 2), 8 * image_bytes(32))


def test_a_system_without_it_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 0)
    monkeypatch.setattr(shared_memory, "SHARED", tmp_path / "shm")
    check_loaders(run_config(2), mesh(0, 1, 1))
