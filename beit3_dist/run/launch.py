"""What every launcher does with a parsed config: check and open everything, then train, and end with one clear line."""

from __future__ import annotations

import atexit
import logging
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch.distributed as dist

from beit3_dist.command_line import is_first_process, log_to_console
from beit3_dist.launched import rank, read_place
from beit3_dist.leaving import leave_when_asked
from beit3_dist.looking import together
from beit3_dist.opening import one_line
from beit3_dist.parallel.meeting import looks_of_all
from beit3_dist.run.endings import DONE, TRACEBACK, Ending, Mistake, Who, ending_of
from beit3_dist.run.failure import end_after_failure, end_now, ends_by_itself
from beit3_dist.terminal import make_output_unfailing

Prepared = TypeVar("Prepared")

MISTAKE_WAIT_S = 5.0
"""How long another process waits with its mistake for the first one's."""


def launch(program: str, prepare: Callable[[], Prepared], train: Callable[[Prepared], None]) -> None:
    """Runs `train(prepare())`. A ValueError or OSError of `prepare` is a mistake of the user's, and ends the process
    before any process group starts; see endings.py for all ways in which a run ends."""
    make_output_unfailing()
    log_to_console()
    leave_when_asked(program)
    try:
        train(_prepared(prepare))
        if _leave_groups():
            atexit._run_exitfuncs()
            # What else Python's end does would abort now and then in a thread that a process group has left.
            end_now(DONE.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        _end(program, *ending_of(error))  # not raised any further: Python's end would wait for what a traceback holds


def _prepared(prepare: Callable[[], Prepared]) -> Prepared:
    """What the processes of a run prepare, looking at files together."""
    try:
        with together(*looks_of_all(read_place())):
            return prepare()
    except (ValueError, OSError) as error:
        raise Mistake(str(error)) from error


def _end(program: str, ending: Ending, error: BaseException) -> NoReturn:
    """Ends this process, and with it the run, in the handler of what has been raised."""
    who, words = ending.who, _last_words(program, ending, error)
    if who is Who.ONE:
        if logging.root.handlers:
            logging.exception("this process failed")  # into its own log as well
        end_after_failure(words, ending.exit_code)
    if who is Who.ALL:
        ends_by_itself.set()  # the processes end each a little later or earlier
        _leave_groups()  # before its threads have done anything else, Python's end may abort in them
    if who is Who.SOME and not is_first_process():
        time.sleep(MISTAKE_WAIT_S)  # where the first process fails too, its launcher ends this one meanwhile
    if who is Who.ANOTHER:
        time.sleep(2 * MISTAKE_WAIT_S)  # or the launcher would end the one that is about to speak
    elif who in (Who.SOME, Who.EACH) or is_first_process():
        print(words, file=sys.stderr, flush=True)
    if who in (Who.SOME, Who.ANOTHER, Who.ALL):
        sys.exit(ending.exit_code)
    end_now(ending.exit_code)


def _last_words(program: str, ending: Ending, error: BaseException) -> str:
    """What this process says of its end: one line where that tells all, else the traceback of what is handled."""
    if ending.who is Who.ONE:
        is_named = dist.is_initialized() and dist.get_world_size() > 1
    else:
        is_named = ending.who is Who.SOME and not is_first_process()
    where = f"rank {rank()} on {socket.gethostname()}" if is_named else ""
    if ending.says != TRACEBACK:
        return f"{program}: {where}{': ' if where else ''}{ending.says.format(error=one_line(error))}"
    return traceback.format_exc() + (f"{program}: {where} is the first to fail, with the error above" if where else "")


def _leave_groups() -> bool:
    """Ends the process groups once all have come here: the store goes with the first process, and whoever still asks
    it would say that it failed. Whether there were any."""
    if not dist.is_initialized():
        return False
    dist.barrier()
    dist.destroy_process_group()
    return True
