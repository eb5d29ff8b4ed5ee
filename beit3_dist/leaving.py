"""Signals that ask this process to go, heeded wherever it waits, and the codes with which it ends.

Slurm sends SIGTERM or the signal of `--signal` before it takes a job's nodes away; other schedulers send SIGTERM, and
a closed terminal sends SIGHUP, which a run under `nohup` goes on ignoring.
Until the training begins there is nothing to save, and the process ends at once: to index and tokenise new data may
take hours, and what is finished stays in data.cache. From then on `run.preemption` saves first.

Python runs a signal's handler in the main thread, between two instructions of the interpreter, and so not while that
thread waits in C for other processes. A thread that does nothing else hears of the signal in any case.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from types import FrameType
from typing import NoReturn

from beit3_dist import launched


class ExitCode(IntEnum):
    """What a program's end says to whoever has started it; run/endings.py lists how a run comes to each."""

    DONE = 0
    FAILED = 1
    """An error has ended it: started again, it may well go on."""
    MISTAKE = 2
    """It was asked for in a way that cannot work."""
    STOPPED = 3
    """It has ended itself before its last step, where it would end again."""
    PREEMPTED = 75
    """It was asked to go, and has saved or had nothing to save yet: it can be started again (EX_TEMPFAIL of
    sysexits.h)."""
    INTERRUPTED = 130
    """Ctrl-C has ended it; the code is a shell's (128 + SIGINT)."""


def interrupted(program: str) -> ExitCode:
    """What a program that trains nothing says of Ctrl-C, and its exit code then."""
    print(f"{program}: interrupted", file=sys.stderr, flush=True)
    return ExitCode.INTERRUPTED


_UNDER_NOHUP = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, *(() if _UNDER_NOHUP else (signal.SIGHUP,)))
"""The signals that ask a process to go."""

STDERR = 2

at_the_end: list[Callable[[], None]] = []
"""Called by `end`: what must not outlive this process even though Python's own clean-up is left out."""


def end(exit_code: int) -> NoReturn:
    """Ends this process at once, without Python's own clean-up, which would wait for threads."""
    for call in at_the_end:
        call()
    os._exit(exit_code)


class _Listener:
    """Hears the signals, whatever the main thread does. One for a process, which has one handler for each signal."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.asked: Callable[[], None] | None = None
        """What to do instead of ending at once; called in the thread."""
        self._hears, self._told = socket.socketpair()
        self._told.setblocking(False)
        signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        _look_after_forks()
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        while numbers := self._hears.recv(64):
            if set(SIGNALS).intersection(numbers):
                (self.asked or self.leave)()

    def leave(self) -> None:
        """Ends the process, with nothing to save."""
        if launched.rank() == 0:  # not by `print`, in the middle of which the signal may have come
            with suppress(OSError):  # nobody may be there to hear it
                os.write(STDERR, f"{self.program}: asked to go before the training has begun\n".encode())
        end(ExitCode.PREEMPTED)


_listener: _Listener | None = None


@functools.cache
def _look_after_forks() -> None:
    """Once for a process, whose forks have what was registered, too."""
    os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_as_born)


_held_back = threading.local()
"""`mask`: the signals that this thread held back anyway, while it forks."""


def _hold_back() -> None:
    """Before a fork: a signal that comes to the child before `_as_born` would be told to this process, or to nobody."""
    _held_back.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held_back.mask)


def _as_born() -> None:
    """In a process just forked, which has no thread that listens: a signal ends it. Otherwise what ends a pool's worker
    would pass it by, and be told to the listener of the process that has forked it, by the socket that both hold."""
    _forget()
    _let_through()


def _forget() -> None:
    """As if this process had never listened."""
    global _listener
    _listener = None
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def leave_when_asked(program: str) -> None:
    """From here on a signal to go ends the process at once, wherever it is. In the main thread."""
    global _listener
    if _listener is None:
        _listener = _Listener(program)
    _listener.asked = None
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)  # the thread does it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launchers/slurm/shield.py has held them back


def when_asked(handler: Callable[[int, FrameType | None], None], asked: Callable[[], None]) -> None:
    """From here on a signal to go calls `handler` in the main thread, as soon as that steps, and `asked` at once, in
    another one."""
    _look_after_forks()
    for number in SIGNALS:
        signal.signal(number, handler)
    if _listener is not None:
        _listener.asked = asked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore() -> None:
    """The run has saved and ends; from here on a signal could only spoil that. Schedulers repeat theirs, and a launcher
    sends SIGTERM to the remaining processes as soon as one has ended with a code other than 0."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
