"""When one process fails, all end within seconds, and the first error is shown last.

A process that fails would leave the others waiting in a collective, with NCCL for half an hour. So it leaves a mark in
the key-value store through which the processes found one another. Every process's watchdog looks there once a second,
and ends its process silently when it sees the mark; errors that the first failure causes elsewhere are only
consequences and are kept off the terminal. The process that failed first waits for the others to end, and then prints
its error. The store lives in rank 0's process, which therefore ends after the others.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Unanswered
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch.distributed as dist

from beit3_dist.leaving import end

WAIT_S = 5.0
"""Seconds that a process waits for the others to end, and for an answer from the store."""

Answer = TypeVar("Answer")

ends_by_itself = threading.Event()
"""Set once this process ends for a reason of its own, so that its watchdog has nothing to end any more."""

_one_thread = threading.Lock()
"""Held from then on: while one thread ends this process, another may fail because the other processes have ended."""


class FailureBoard:
    """The mark in the store, over a connection of its own, so that no other use of the store delays it.

    Every method raises RuntimeError where the store is gone, and with it the process that holds it.
    """

    def __init__(self) -> None:
        """Needs MASTER_ADDR and MASTER_PORT, and a process group that was started through them."""
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=WAIT_S),
        )
        # torchrun restarts the processes but not the store.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"beit3_dist/failure/{attempt}", store)
        self._world = dist.get_world_size()

    def post(self, exit_code: int) -> bool:
        """Puts the mark up, with the code that all shall end with. Whether this process is the first to do so."""
        is_first = self._store.add("first", 1) == 1
        if is_first:
            self._store.set("failed", str(exit_code))
        return is_first

    def is_posted(self) -> bool:
        """Whether some process has failed."""
        return self._store.check(["failed"])

    def exit_code(self) -> int:
        """The code of the mark that is up."""
        return int(self._store.get("failed"))

    def ask_where(self) -> None:
        """Asks every process to `tell` in which collective it is."""
        self._store.set("where", "")

    def is_asked_where(self) -> bool:
        return self._store.check(["where"])

    def tell(self, rank: int, where: str) -> None:
        """What a process answers."""
        self._store.set(f"where/{rank}", where)

    def told(self) -> dict[int, str]:
        """The answers by rank: of all processes, or of those that have given one within WAIT_S."""
        deadline, told = time.monotonic() + WAIT_S, dict[int, str]()
        while len(told) < self._world and time.monotonic() < deadline:
            for rank in range(self._world):
                if rank not in told and self._store.check([f"where/{rank}"]):
                    told[rank] = self._store.get(f"where/{rank}").decode()
            time.sleep(0.1)
        return told

    def ask_to_go(self) -> None:
        self._store.set("asked", "")

    def is_asked_to_go(self) -> bool:
        return self._store.check(["asked"])

    def leave(self) -> None:
        """Says that this process ends because of the mark."""
        self._store.add("gone", 1)

    def wait_for_others(self, but: int = 1) -> None:
        """Returns when all processes `but` so many have left, or after WAIT_S."""
        deadline = time.monotonic() + WAIT_S
        while self._store.add("gone", 0) < self._world - but and time.monotonic() < deadline:
            time.sleep(0.1)


def answered(ask: Callable[[], Answer], within_s: float = WAIT_S) -> Answer:
    """What the store answers. Raises RuntimeError also where its process, or its host, has stopped: torch would wait
    for that without a limit."""
    answer: Future[Answer] = Future()

    def wait() -> None:
        try:
            answer.set_result(ask())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=wait, name="answer", daemon=True).start()
    try:
        return answer.result(within_s)
    except Unanswered:
        raise RuntimeError("the process that holds the store does not answer") from None


@functools.cache
def failure_board() -> FailureBoard:
    """This process's connection to the mark."""
    return FailureBoard()


def end_after_failure(message: str, exit_code: int) -> NoReturn:
    """Ends this process at once, whatever it is doing, and all others with the same exit code. Prints the message
    unless another process failed before."""
    _one_thread.acquire()  # for ever: a second thread waits here until the process is gone
    ends_by_itself.set()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends us when it sees another one end
    if _is_first(exit_code):
        print(message.rstrip(), file=sys.stderr, flush=True)
    end_now(exit_code)


def end_now(exit_code: int) -> NoReturn:
    """Ends this process without Python's own clean-up, which would wait for threads and collectives, some for ever."""
    logging.shutdown()
    sys.stdout.flush()
    end(exit_code)


def _is_first(exit_code: int) -> bool:
    """Whether this process failed before all others; they are gone then."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    try:
        is_first = answered(lambda: failure_board().post(exit_code))
    except RuntimeError:  # the store died or stopped with its process, so that nobody can say who was first
        return True
    with suppress(RuntimeError):
        if is_first:
            failure_board().wait_for_others()
        else:
            leave_after_another()
    return is_first


def leave_after_another() -> None:
    """For a process that ends because another one failed: rank 0's, which holds the store, ends last."""
    if dist.get_rank() == 0:
        failure_board().wait_for_others(but=2)
    failure_board().leave()
