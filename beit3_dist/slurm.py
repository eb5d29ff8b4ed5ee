"""Translates Slurm's description of a process into the variables that torch and DeepSpeed read.

Under plain `srun` nobody sets RANK and MASTER_ADDR. Slurm says the same in variables of its own (`man srun`, "OUTPUT
ENVIRONMENT VARIABLES"). Only those of a step count: a batch script, outside `srun`, is one process.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

FIRST_PORT, PORTS = 20_000, 10_000
"""Ports for rank 0's rendezvous: below those that Linux hands out by itself (32,768 and up)."""


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in a step of several tasks.

    A launcher that has set RANK goes first, and so does a MASTER_ADDR or MASTER_PORT from outside. The address is the
    name of the step's first node; the port follows from the job and the step, so that all tasks know it.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = str(tasks[int(environment["SLURM_NODEID"])])
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    step = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + step % PORTS))


def first_host(nodes: str) -> str:
    """The first host of a Slurm list: `rack[2-3]gpu[007-010,12],login` -> rack2gpu007."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes)
    if first is None:
        raise ValueError(f"{nodes!r} is no list of hosts as Slurm writes it")
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first.group())


def tasks_per_node(counts: str) -> list[int]:
    """Tasks of every node: `2(x3),1` -> [2, 2, 2, 1]."""
    parts = (part.partition("(x") for part in counts.split(","))
    return [int(count) for count, _, times in parts for _ in range(int(times.rstrip(")") or 1))]
