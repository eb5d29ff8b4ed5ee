"""What every launcher does with a parsed config: check and open everything, then train, and end with one clear line."""

from __future__ import annotations

import atexit
import errno
import logging
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist

from beit3_dist.checkpoint.find import Damaged
from beit3_dist.command_line import FAILED, STOPPED, is_first_process, log_to_console, one_line, refuse
from beit3_dist.data.faults import StreamFailed
from beit3_dist.data.loader import WorkerKilled
from beit3_dist.launched import rank
from beit3_dist.leaving import PREEMPTED, leave_when_asked
from beit3_dist.parallel.meeting import NotMet
from beit3_dist.run.bad_samples import RunStopped
from beit3_dist.run.failure import end_after_failure, end_now, ending
from beit3_dist.run.lock import FolderInUse
from beit3_dist.run.preemption import Preempted
from beit3_dist.terminal import make_output_unfailing

Ready = TypeVar("Ready")

INTERRUPTED = 130
"""Exit code of a run that Ctrl-C has ended, as a shell gives it (128 + SIGINT)."""
WAIT_S = 5.0
"""How long another process waits with its mistake for the first one's."""


def launch(program: str, prepare: Callable[[], Ready], train: Callable[[Ready], None]) -> None:
    """Runs `train(prepare())`. A mistake that `prepare` finds ends the process with exit code 2 before any process
    group starts; a run that stops itself ends with exit code 3; one that was asked to go, and has saved or has nothing
    to save yet, with 75; one that Ctrl-C interrupts with 130. An error in one process ends all of them with 1, the
    first error last."""
    make_output_unfailing()
    log_to_console()
    leave_when_asked(program)
    try:
        ready = prepare()
    except (ValueError, OSError) as error:
        _refuse_for_one(program, error)
    except KeyboardInterrupt:
        _end_interrupted(program)
    try:
        train(ready)
        if _part():
            atexit._run_exitfuncs()
            end_now(0)  # what else Python's end does would abort now and then in a thread that a process group has left
    except (Damaged, FolderInUse) as mistake:  # which it takes all processes to find
        _part()  # before its threads have done anything else, Python's end may abort in them
        refuse(program, mistake)
    except RunStopped as stop:
        ending.set()  # the processes end by themselves, each a little later or earlier
        _part()
        refuse(program, stop, exit_code=STOPPED)
    except NotMet as trouble:  # each process tells what it has waited for
        print(f"{program}: error: {one_line(trouble)}", file=sys.stderr, flush=True)
        end_now(trouble.exit_code)
    except Preempted as stop:
        if is_first_process():
            print(f"{program}: {stop}", file=sys.stderr, flush=True)
        end_now(PREEMPTED)  # there is little time
    except KeyboardInterrupt:
        _end_interrupted(program)
    except Exception as error:  # not raised any further: Python's end would wait for what the traceback keeps alive
        message, code = _last_words(program, error)
        if logging.root.handlers:
            logging.exception("this process failed")  # into its own log as well
        end_after_failure(message, code)


def _last_words(program: str, error: Exception) -> tuple[str, int]:
    """What is said of the error that ends this process alone, and the exit code. One line where that tells all."""
    where = _where(dist.get_rank()) if dist.is_initialized() and dist.get_world_size() > 1 else ""
    in_a_line = f"{program}: {f'{where}: ' if where else ''}error: "
    if (full := _full_disk(error)) is not None:
        remedy = "make room, then go on with --checkpoint.resume auto"
        return f"{in_a_line}{full.filename or 'the run folder'}: {full.strerror}: {remedy}", STOPPED
    if isinstance(error, WorkerKilled):
        return in_a_line + one_line(error), FAILED
    if isinstance(error, StreamFailed):  # of a validation: in training all processes stop together
        return in_a_line + one_line(error), STOPPED
    said = f"{program}: {where} is the first to fail, with the error above" if where else ""
    return traceback.format_exc() + said, FAILED


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error, or the one behind it, of a disk that takes no more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None


def _part() -> bool:
    """Ends the process groups once all have come here: the store goes with the first process, and whoever still asks
    it would say that it failed. Whether there were any."""
    if not dist.is_initialized():
        return False
    dist.barrier()
    dist.destroy_process_group()
    return True


def _refuse_for_one(program: str, error: Exception) -> NoReturn:
    """`refuse`, for a mistake that perhaps not all processes meet: data that one node has not mounted, a broken tar of
    which only the process knows that reads it. Where the first process fails too, its launcher ends the others while
    they wait for its line; else each says what it has met."""
    if not is_first_process():
        time.sleep(WAIT_S)
        print(f"{program}: {_where(rank())}: error: {one_line(error)}", file=sys.stderr, flush=True)
    refuse(program, error)


def _end_interrupted(program: str) -> NoReturn:
    """Ends the process at once after Ctrl-C, which all processes of a terminal get."""
    if is_first_process():
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
    end_now(INTERRUPTED)


def _where(rank: object) -> str:
    return f"rank {rank} on {socket.gethostname()}"
