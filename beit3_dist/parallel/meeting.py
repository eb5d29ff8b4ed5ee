"""How the processes of a run find one another, and what they say where they do not."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from threading import Timer

import torch
import torch.distributed as dist
from torch.distributed import Store

from beit3_dist.launched import UNSET, ProcessPlace
from beit3_dist.looking import ALONE, Looks

PATIENCE = timedelta(minutes=10)
"""How long the processes wait for one another, and a collective for the ranks that it lacks where nobody says how long
it shall, as in torch."""
SILENCE_S = 20.0
"""After so long a process says what it waits for."""


class NotMet(Exception):
    """The processes have not found one another; in one line."""


class PortInUse(NotMet):
    """Another program has the port at which they were to meet."""


_numbers = count()
"""Of the times that the processes look together; one after the other, they do in the stages of a run."""
_found: list[Store] = []
"""The store at which the processes have met before there is a process group."""


def meeting_place(rank: int, world: int) -> Store:
    """The store of a run of several processes. Raises NotMet."""
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if not _found:
        with _meeting(rank, world):
            store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=PATIENCE))
        store.set_timeout(PATIENCE)
        _found.append(store)
    return _found[0]


def meet(backend: str, rank: int, world: int, device: torch.device | None) -> None:
    """Starts torch's process group of all, where there is none. `device`: to bind it to, as DeepSpeed does with CUDA's.

    A process alone asks nobody: it neither needs a port nor reads MASTER_ADDR. Raises NotMet.
    """
    if dist.is_initialized():
        return
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    place = dist.PrefixStore("default_pg", meeting_place(rank, world))
    _found.clear()
    with _meeting(rank, world):
        dist.init_process_group(backend, store=place, rank=rank, world_size=world, timeout=PATIENCE, device_id=device)


@contextmanager
def _meeting(rank: int, world: int) -> Iterator[None]:
    """Says what is waited for, and why in vain. Raises NotMet."""
    with _telling(f"rank {rank} of {world} on {socket.gethostname()}", _waited_for(rank, world)):
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            raise _not_met(error, rank, world) from None


def looks_of_all(place: ProcessPlace) -> tuple[Looks, Looks]:
    """The looks of all processes of the run, and of those of this node, which meet at the first one."""
    if place.world == 1:
        return ALONE, ALONE
    number = next(_numbers)

    def meet() -> Store:
        return dist.PrefixStore(f"beit3_dist/looks/{number}", meeting_place(place.rank, place.world))

    # A container has a name of its own where it has not a node of its own.
    node = f"{socket.gethostname()}/{Path('/proc/sys/kernel/random/boot_id').read_bytes().strip().decode()}"
    is_first = place.rank == 0
    of_run = Looks(meet, "run", is_first, place.world - 1 if is_first else 0)
    return of_run, Looks(meet, node, place.local_rank == 0)


def _waited_for(rank: int, world: int) -> str:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"the other {world - 1} to come to {where}" if rank == 0 else f"rank 0 to answer at {where}"


@contextmanager
def _telling(who: str, what: str) -> Iterator[None]:
    """Says on the terminal, after SILENCE_S, what is waited for. Every process does: the first one may not exist."""
    line = (
        f"{who} waits for {what}, for {PATIENCE.total_seconds() / 60:g} minutes at most: the launcher must start every "
        f"rank, and they must reach MASTER_ADDR and MASTER_PORT; {UNSET}"
    )
    timer = Timer(SILENCE_S, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_met(error: Exception, rank: int, world: int) -> NotMet:
    """What has kept the processes from meeting, with the remedy."""
    port, reason = os.environ["MASTER_PORT"], str(error).partition("\n")[0]
    if errno.errorcode[errno.EADDRINUSE] in reason or "address already in use" in reason.lower():
        return PortInUse(
            f"MASTER_PORT={port} is in use on {socket.gethostname()}, perhaps by another run: choose another one, by "
            "--master_port of the launcher or by MASTER_PORT"
        )
    return NotMet(
        f"rank {rank} of {world} on {socket.gethostname()} has waited in vain for {_waited_for(rank, world)} "
        f"({reason[:300]}): the launcher must start every rank, and they must reach MASTER_ADDR and MASTER_PORT; "
        f"{UNSET}"
    )
