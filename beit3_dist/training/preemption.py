"""A signal that the process has to go soon, turned into a checkpoint at the next step boundary.

Slurm sends SIGTERM or the signal of `--signal` before it takes a job's nodes away; other schedulers send SIGTERM. The
signal may reach some processes earlier than others, or some not at all, so all of them agree after every step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from beit3_dist.command_line import is_first_process

PREEMPTED = 75
"""Exit code of a run that was asked to go, and has saved or had nothing to save yet: it can be started again
(EX_TEMPFAIL of sysexits.h)."""

STDERR = 2

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preempted(Exception):
    """The run was asked to go, and has saved where it was."""


@contextmanager
def nothing_to_save(program: str) -> Iterator[None]:
    """Within it a signal to go ends the process at once, with PREEMPTED: to index and tokenise new data takes hours,
    and what is finished of it stays in data.cache."""

    def leave(number: int, frame: FrameType | None) -> None:
        if is_first_process():  # not by `print`, in the middle of which the signal may have come
            os.write(STDERR, f"{program}: asked to go before the training has begun\n".encode())
        os._exit(PREEMPTED)  # not by an exception, which whatever is running might take for a broken file's

    before = {number: signal.signal(number, leave) for number in SIGNALS}
    held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # by launchers/slurm/shield.py
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether the run was asked to go. Listens from its making on."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._asked = device, False
        for number in SIGNALS:
            signal.signal(number, self._ask)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launchers/slurm/shield.py has held them back

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self) -> bool:
        """Whether any process was asked; the same answer in all. Collective."""
        asked = torch.tensor(int(self._asked), device=self._device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)

    def close(self) -> None:
        """The run has saved and ends: from here on a signal can only spoil its end. A scheduler repeats its own, and a
        launcher sends SIGTERM to the processes that are left as soon as one has ended with a code other than 0."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
