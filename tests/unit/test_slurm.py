"""Slurm's variables in the words of torch; Slurm's own examples of lists (`man scontrol`, `man srun`)."""

from __future__ import annotations

import pytest

from beit3_dist.slurm import adopt_slurm, first_host, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[007-008,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_a_task_of_a_step() -> None:
    environment = dict(STEP)
    adopt_slurm(environment)
    adopted = {name: value for name, value in environment.items() if name not in STEP}
    assert adopted == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "24569",
    }


def test_what_is_set_from_outside_goes_first() -> None:
    environment = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}
    adopt_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "4000")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty
        STEP | {"RANK": "1", "WORLD_SIZE": "2"},  # the deepspeed launcher or torchrun under srun
    ],
    ids=["no Slurm", "batch script", "one task", "launcher"],
)
def test_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-4]", "node1"),
        ("node[010-012,3]-ib,login", "node010-ib"),
        ("rack[2-3]gpu[07,9]", "rack2gpu07"),
        ("127.0.0.[1-2]", "127.0.0.1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_no_host() -> None:
    with pytest.raises(ValueError, match="''"):
        first_host("")


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
