"""Threads that end this process when a step hangs or when another process has failed."""

from __future__ import annotations

import faulthandler
import logging
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from beit3_dist.parallel.meeting import PATIENCE
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.endings import ANOTHER_FAILED, HANGING_STEP
from beit3_dist.run.failure import (
    WAIT_S,
    answered,
    end_after_failure,
    end_now,
    ends_by_itself,
    failure_board,
    leave_after_another,
)
from beit3_dist.run.guards.collectives import Where, missing, where_am_i
from beit3_dist.run.preemption import interrupt_main_thread

FIRST_STEP = 3
"""The first step of a process may take so many times the limit: kernels are compiled, caches are filled."""

LOOK_S = 1.0
"""Seconds between two looks at the clock and at the other processes."""

GONE_S = 10.0
"""Seconds that a process which no longer reaches the store has to end by itself: the process that holds the store may
have finished a moment before the others, or its end becomes an error in the collective that this one is in."""

MOST_LINES = 3
"""Of those that say who is missing where."""

BACKSTOP_S = 60.0
"""So many seconds later the process is ended even if a hanging call in C keeps every Python thread waiting."""


def patience(limit_s: float) -> timedelta:
    """How long a collective waits for missing ranks, where a step may take `limit_s` seconds (0: any time): longer than
    the watchdog, which says more than a collective's error; not shorter than torch's own limit, since nobody watches
    what comes before the first step."""
    return max(PATIENCE, timedelta(seconds=2 * FIRST_STEP * limit_s)) if limit_s else timedelta(days=7)


class Watchdog:
    """Watches from its making until `close`. The stacks of all threads go into the process's log before it is ended."""

    def __init__(self, limit_s: float, mesh: Mesh, log_file: Path) -> None:
        """`limit_s`: seconds that a step may take, its validation and its checkpoint included; 0: any time."""
        self._limit_s, self._mesh = limit_s, mesh
        self._stacks = open(log_file, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the process)
        self._board = failure_board() if mesh.world > 1 else None
        self._step, self._deadline = 0, float("inf")
        self._closed = threading.Event()
        # Two of them: who asks a store whose process has stopped waits for ever, and no longer looks at the clock.
        watch = {"watchdog": self._watch_clock} | ({"others": self._watch_others} if self._board else {})
        self._threads = [threading.Thread(target=one, name=name, daemon=True) for name, one in watch.items()]
        for thread in self._threads:
            thread.start()

    def begin(self, step: int) -> None:
        """Step number `step` = 1, 2, ... begins, and the one before has ended."""
        if self._limit_s:
            limit_s = self._limit_s * (FIRST_STEP if self._step == 0 else 1)
            self._step, self._deadline = step, time.monotonic() + limit_s
            faulthandler.dump_traceback_later(limit_s + BACKSTOP_S, exit=True, file=self._stacks)

    def close(self) -> None:
        if self._limit_s:
            faulthandler.cancel_dump_traceback_later()
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._stacks.close()

    def _watch_clock(self) -> None:
        while not self._closed.wait(LOOK_S) and not ends_by_itself.is_set():
            if time.monotonic() > self._deadline:
                self._end_hanging_step()

    def _watch_others(self) -> None:
        assert self._board is not None
        asked = told = False
        while not self._closed.wait(LOOK_S) and not ends_by_itself.is_set():
            try:
                if not asked and self._board.is_asked_to_go():
                    asked = True
                    interrupt_main_thread()
                if not told and self._board.is_asked_where():
                    told = True
                    self._board.tell(self._mesh.rank, where_am_i().text())
                if self._board.is_posted() and not ends_by_itself.is_set():
                    self._end_with_the_others()
            except RuntimeError as error:
                if not self._closed.wait(GONE_S) and not ends_by_itself.is_set():
                    logging.error("the process that holds the store is gone (%s): ending this one", error)
                    self._dump()
                    end_now(ANOTHER_FAILED.exit_code)
                return

    def _end_hanging_step(self) -> None:
        self._dump()
        message = (
            f"step {self._step} has taken longer than guards.step_timeout_s={self._limit_s:g} seconds allow; rank "
            f"{self._mesh.rank} on {socket.gethostname()} ends the run. {self._missing()}What each process was doing "
            f"stands in {Path(self._stacks.name).parent}/rank*.log"
        )
        logging.error(message)  # into this process's log only
        end_after_failure(message, HANGING_STEP.exit_code)

    def _missing(self) -> str:
        """Whom the others wait for, in sentences."""
        if self._board is None:
            return ""
        try:
            told = answered(self._ask_where, 2 * WAIT_S)
        except RuntimeError as error:
            return f"Rank 0 may be the one that hangs: {error}. "
        lines = missing({rank: Where.of(text) for rank, text in told.items()}, self._mesh.world)
        return "".join(f"{line[0].upper()}{line[1:]}. " for line in lines[:MOST_LINES])

    def _ask_where(self) -> dict[int, str]:
        """In which collective each rank is, those that answer."""
        assert self._board is not None
        self._board.tell(self._mesh.rank, where_am_i().text())
        self._board.ask_where()
        return self._board.told()

    def _end_with_the_others(self) -> None:
        logging.error("another process has failed: ending this one")
        self._dump()
        exit_code: int = ANOTHER_FAILED.exit_code
        with suppress(RuntimeError):
            assert self._board is not None
            exit_code = self._board.exit_code()
            leave_after_another()
        end_now(exit_code)

    def _dump(self) -> None:
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
