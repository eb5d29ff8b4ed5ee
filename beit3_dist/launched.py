"""How this process was started: alone, or with others by a launcher; and what an earlier job has left in the shell.

torchrun, the deepspeed launcher and, for plain srun, `slurm.adopt_slurm` describe a process by RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE (deepspeed: LOCAL_SIZE), MASTER_ADDR and MASTER_PORT. torch and DeepSpeed read the same
variables: where another job has left them behind, both wait for ever for processes that nobody has started.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from beit3_dist.slurm import adopt_slurm

MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Where the processes of a run meet."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", *MEETING)
"""All variables that describe a process."""
UNSET = f"where this process is meant to be alone, an earlier job has left it in the shell: unset {' '.join(VARIABLES)}"
"""The remedy for variables that another job has left behind."""


@dataclass(frozen=True)
class ProcessPlace:
    """This process among those of the run."""

    rank: int
    world: int
    local_rank: int
    """Its number on this host."""
    local_world: int
    """Processes on this host."""


def read_place(environment: MutableMapping[str, str] = os.environ) -> ProcessPlace:
    """The place that the variables describe; that of a single process where they are not set.

    Raises ValueError, naming the variable and the remedy, for values that no launcher sets.
    """
    rank, world = _number("RANK", environment, 0), _number("WORLD_SIZE", environment, 1)
    _check(world >= 1, "WORLD_SIZE", environment, "there is at least one process")
    for name in ("RANK", *MEETING):
        _check(world == 1 or bool(environment.get(name)), "WORLD_SIZE", environment, f"{name} is not set")
    _check(0 <= rank < world, "RANK", environment, f"it is not below WORLD_SIZE={world}")
    local_world = _number("LOCAL_WORLD_SIZE", environment, 0) or _number("LOCAL_SIZE", environment, 0) or world
    local_rank = _number("LOCAL_RANK", environment, 0)
    _check(0 <= local_rank < local_world, "LOCAL_RANK", environment, f"this host has {local_world} process(es)")
    if world > 1:
        port = _number("MASTER_PORT", environment, 0)
        _check(0 < port < 1 << 16, "MASTER_PORT", environment, "it is no port")
    return ProcessPlace(rank, world, local_rank, local_world)


def _number(name: str, environment: MutableMapping[str, str], default: int) -> int:
    """The whole number that a variable holds; `default` where it is not set, or set to nothing."""
    value = environment.get(name)
    if not value:
        return default
    _check(value.isascii() and value.removeprefix("-").isdigit(), name, environment, "it is no whole number")
    return int(value)


def _check(condition: bool, name: str, environment: MutableMapping[str, str], problem: str) -> None:
    if not condition:
        raise ValueError(f"{name}={environment.get(name, '')} in the environment: {problem}; {UNSET}")


_place: ProcessPlace | None = None
"""This process's, once it has taken its place."""


def take_place(environment: MutableMapping[str, str] = os.environ) -> ProcessPlace:
    """Reads this process's place once and for all; from here on `rank` is what the launcher says. Drops variables that
    are set to nothing, which torch and DeepSpeed would not understand. Raises ValueError as `read_place` does."""
    global _place
    for name in VARIABLES:
        if environment.get(name) == "":
            del environment[name]
    adopt_slurm(environment)
    _place = read_place(environment)
    return _place


def rank() -> int:
    """This process's rank; 0 in programs that no launcher starts, whatever the shell's variables say."""
    return 0 if _place is None else _place.rank
