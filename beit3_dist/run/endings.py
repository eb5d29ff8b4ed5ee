"""Why a run ends: every way, with its exception, its exit code, and which process says what.

`launch` acts on what the training raises. Where no exception tells, a thread ends the process: guards/watchdog.py after
a hanging step or another process's failure, leaving.py before the training has begun.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from beit3_dist.checkpoint.find import Damaged
from beit3_dist.checkpoint.initial import UnreadableWeights
from beit3_dist.data.faults import Fault, StreamFailed
from beit3_dist.data.loader import WorkerKilled
from beit3_dist.leaving import ExitCode
from beit3_dist.looking import ToldElsewhere
from beit3_dist.parallel.meeting import NotMet, PortInUse


class Mistake(ValueError):
    """What the user has asked for cannot work; found before any process group."""


class FolderInUse(ValueError):
    """OUT belongs to another run for now."""


class RunStopped(RuntimeError):
    """The run ended itself for a reason that its message tells the user; nothing is wrong with the program."""

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        """`faults`: the samples that it ended for, where they are in no step's record yet."""
        super().__init__(message)
        self.faults = list(faults)


class StorageLost(RunStopped):
    """The data can no longer be read, since storage gives none of them: started again, the run may well go on."""


class AskedToGo(Exception):
    """The run has to save and go. Raised in all processes at the same place; it becomes Preempted."""


class Preempted(Exception):
    """The run was asked to go, and has saved where it was."""


class FullDisk(Exception):
    """The disk takes no more."""

    @classmethod
    def behind(cls, error: BaseException | None) -> FullDisk | None:
        """The full disk that an error, or one behind it, is about; None: it is about none."""
        while error is not None:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                remedy = "make room, then go on with --checkpoint.resume auto"
                return cls(f"{error.filename or 'the run folder'}: {error.strerror}: {remedy}")
            error = error.__cause__ or error.__context__
        return None


class Who(Enum):
    """The processes that an ending is about, and those of them that say so."""

    ALL = "All processes, after the same step, leave their groups together; the first one speaks."
    ALL_AT_ONCE = "All processes end at once, each by itself; the first one speaks."
    EACH = "Each process that meets it ends at once and speaks for itself."
    SOME = "Perhaps not all processes meet it: the first one speaks, another one after it and with its rank."
    ANOTHER = "It waits, silently, for the process that has looked for it and speaks."
    ONE = "One process ends all others, and speaks last, with its rank."


TRACEBACK = "traceback"


@dataclass(frozen=True)
class Ending:
    """One way in which a run ends."""

    why: str
    error: type[BaseException] | None
    """The exception that tells of it; None: there is none."""
    exit_code: ExitCode
    who: Who
    says: str = "error: {error}"
    """What is printed, in one line after the program's name; TRACEBACK: the error's traceback."""


DONE = Ending("the last step is done", None, ExitCode.DONE, Who.ALL, "")
HANGING_STEP = Ending("a step takes longer than guards.step_timeout_s", None, ExitCode.FAILED, Who.ONE)
ANOTHER_FAILED = Ending("another process has failed, whose exit code it takes", None, ExitCode.FAILED, Who.ONE, "")

ENDINGS = (
    DONE,
    Ending("a mistake in config or data", Mistake, ExitCode.MISTAKE, Who.SOME),
    Ending("a mistake that the process which looks for it has found", ToldElsewhere, ExitCode.MISTAKE, Who.ANOTHER, ""),
    Ending("a port is in use", PortInUse, ExitCode.MISTAKE, Who.EACH),
    Ending("the processes have not found one another", NotMet, ExitCode.FAILED, Who.EACH),
    Ending("another run has the folder", FolderInUse, ExitCode.MISTAKE, Who.ALL),
    Ending("the checkpoint to go on from is damaged", Damaged, ExitCode.MISTAKE, Who.ALL),
    Ending("storage gives nothing of the data any more", StorageLost, ExitCode.FAILED, Who.ALL),
    Ending("bad samples, skipped steps, or a checkpoint that cannot be written", RunStopped, ExitCode.STOPPED, Who.ALL),
    Ending("asked to go by a signal", Preempted, ExitCode.PREEMPTED, Who.ALL_AT_ONCE, "{error}"),
    Ending("Ctrl-C", KeyboardInterrupt, ExitCode.INTERRUPTED, Who.ALL_AT_ONCE, "interrupted"),
    Ending("the disk is full", FullDisk, ExitCode.STOPPED, Who.ONE),
    Ending("what it starts from cannot be read", UnreadableWeights, ExitCode.MISTAKE, Who.ONE),
    Ending("a loader process was killed", WorkerKilled, ExitCode.FAILED, Who.ONE),
    Ending("a validation example cannot be read", StreamFailed, ExitCode.STOPPED, Who.ONE),  # in training all stop
    HANGING_STEP,
    ANOTHER_FAILED,
    Ending("an error that nobody expects", Exception, ExitCode.FAILED, Who.ONE, TRACEBACK),
)
"""All of them; an error means the first one whose exception it is an instance of."""

STARTED_AGAIN = (ExitCode.FAILED, ExitCode.PREEMPTED)
"""After these a job should be started again, with --checkpoint.resume auto; after the others it would end alike."""


def ending_of(error: BaseException) -> tuple[Ending, BaseException]:
    """The way in which an error ends a run, and the error whose message says so: itself, or one behind it."""
    telling = (error, FullDisk.behind(error))
    return next(
        (ending, told) for ending in ENDINGS for told in telling if ending.error and isinstance(told, ending.error)
    )
