"""Process groups: who is in which, how many collectives it takes to make them, how long they wait."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed
import pytest
import torch
import torch.distributed as dist

from beit3_dist.parallel import mesh
from beit3_dist.parallel.mesh import Groups, connect, read_mesh
from beit3_dist.run.guards.watchdog import BACKSTOP_S, FIRST_STEP, patience
from tests.parallel.workers import Workers

WORLD = [0, 1, 2, 3]


def describe(groups: Groups) -> list[tuple[list[int], int, float]]:
    """By group: its members, the sum of their ranks over it, and its patience in seconds."""
    found = []
    for group in (groups.tensor, groups.data, groups.pipeline, groups.model, dist.group.WORLD):
        total = torch.tensor(dist.get_rank())
        dist.all_reduce(total, group=group)
        patience = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        found.append((dist.get_process_group_ranks(group), int(total), patience))
    return found


def connect_again(groups: Groups) -> tuple[list[tuple[list[int], int, float]], list[tuple[int, ...]]]:
    """The groups of another `connect`, as a run has them, and the members of those that this process made for it."""
    made: list[tuple[int, ...]] = []
    new_group = dist.new_group

    def counted(ranks: list[int], timeout: timedelta, use_local_synchronization: bool) -> dist.ProcessGroup:
        made.append(tuple(ranks))
        return new_group(ranks, timeout, use_local_synchronization=use_local_synchronization)

    dist.new_group = counted
    try:
        return describe(connect(groups.mesh, timedelta(hours=3))), made
    finally:
        dist.new_group = new_group


@pytest.mark.parametrize(
    ("tensor", "pipeline", "expected"),
    [  # of rank 1: tensor, data, pipeline, model
        (1, 1, [[1], WORLD, [1], [1]]),
        (2, 1, [[0, 1], [1, 3], [1], [0, 1]]),
        (2, 2, [[0, 1], [1], [1, 3], WORLD]),
    ],
)
def test_members_patience_and_cost(tensor: int, pipeline: int, expected: list[list[int]]) -> None:
    """A process makes one group for each way of sharing the world out, whatever the number of groups in it: each is a
    split of NCCL's communicator in which all take part."""
    with Workers(4, tensor, pipeline) as workers:
        results = workers.run(connect_again)
    for found, _ in results:
        assert [total for _, total, _ in found] == [sum(members) for members, _, _ in found]
        assert {patience for _, _, patience in found} == {3 * 3600}, "the world's group has it as well"
    found, made = results[1]
    assert [members for members, _, _ in found] == [*expected, WORLD]
    assert sorted(made) == sorted({tuple(members) for members in expected} - {tuple(WORLD)})


@pytest.mark.parametrize(("limit_s", "expected"), [(0, 7 * 86_400), (5, 600), (1800, 10_800), (36_000, 216_000)])
def test_the_watchdog_comes_first(limit_s: float, expected: float) -> None:
    assert patience(limit_s).total_seconds() == expected
    assert patience(limit_s).total_seconds() > FIRST_STEP * limit_s + BACKSTOP_S


def test_deepspeed_is_told_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task=1`: the third process of a node sees one device, and DeepSpeed takes number LOCAL_RANK."""
    place = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (place | {"DS_ACCELERATOR": "cuda"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    at_start: list[str] = []
    monkeypatch.setattr(mesh, "meet", lambda *_: None)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: at_start.append(os.environ["LOCAL_RANK"]))
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda _: None)
    monkeypatch.setattr(mesh, "Groups", lambda *_: None)
    connect(read_mesh())
    assert at_start == ["0"]
