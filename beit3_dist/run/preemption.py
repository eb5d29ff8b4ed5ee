"""A request to go soon, turned into a checkpoint before the next step.

A signal may reach some processes earlier than others, or some not at all. So the one that hears it tells the others
through the store, and before every step all of them agree. A process that waits for data gives that up, since an
unreadable shard may be tried for minutes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from beit3_dist.data.faults import StreamFailed, of_storage
from beit3_dist.gathering import gather_objects
from beit3_dist.leaving import ignore, when_asked
from beit3_dist.run.endings import AskedToGo, RunStopped, StorageLost
from beit3_dist.run.failure import failure_board

Read = TypeVar("Read")

DELIVERED, ASKED, BROKEN = range(3)
"""Outcomes of a process's reading; all processes act on the worst."""


class Together(Protocol):
    """Reads data in all processes, or in none."""

    def __call__(self, read: Callable[[], Read]) -> Read: ...


def by_itself(read: Callable[[], Read]) -> Read:
    """Reads without asking anybody."""
    return read()


class _Interrupted(BaseException):
    """Ends the waiting for data. Not an Exception, which the code that reads might take for a broken file."""


class StopRequest:
    """Whether the run was asked to go, from when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._asked, self._waits = device, False, False
        when_asked(self._ask, self._tell)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._waits:
            self._waits = False
            raise _Interrupted

    def _tell(self) -> None:
        """Tells the other processes, from a thread: the main one may be waiting for one of them."""
        self._asked = True
        if dist.is_initialized() and dist.get_world_size() > 1:
            with suppress(RuntimeError):  # the store is gone, and with it the process that holds it
                failure_board().ask_to_go()

    def together(self, read: Callable[[], Read]) -> Read:
        """What `read` gives, once it has given something in all processes. Collective.

        Raises AskedToGo in all of them where one was asked to go, before or meanwhile, whose reading is given up then,
        and RunStopped in all of them where a stream of one has failed, StorageLost where that is the storage's fault.
        """
        outcome, result, failure = DELIVERED, None, StreamFailed("")
        try:
            try:
                self._waits = True
                if self._asked:
                    raise _Interrupted
                result = read()
            finally:
                self._waits = False
        except _Interrupted:
            outcome = ASKED
        except StreamFailed as error:
            outcome, failure = BROKEN, error
        worst = torch.tensor(ASKED if outcome == DELIVERED and self._asked else outcome, device=self._device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if worst == ASKED:
            raise AskedToGo
        if worst == BROKEN:
            _stop(failure)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        ignore()


def _stop(mine: StreamFailed) -> None:
    """Raises RunStopped or StorageLost with what the first process says whose stream has failed. Collective."""
    failures = [failure for failure in gather_objects(mine) if str(failure)]
    stopped = StorageLost if all(of_storage(failure.faults) for failure in failures) else RunStopped
    raise stopped(str(failures[0]), [fault for failure in failures for fault in failure.faults])


def interrupt_main_thread() -> None:
    """As if this process had got a signal to go."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
