"""What every launcher does with a parsed config: check and open everything, then train, and end with one clear line."""

from __future__ import annotations

import logging
import socket
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from beit3_dist.checkpoint.find import Damaged
from beit3_dist.command_line import STOPPED, is_first_process, log_to_console, refuse
from beit3_dist.training.failure import end_after_failure, end_now, ending
from beit3_dist.training.preemption import PREEMPTED, Preempted
from beit3_dist.training.resilience import RunStopped

Ready = TypeVar("Ready")


def launch(program: str, prepare: Callable[[], Ready], train: Callable[[Ready], None]) -> None:
    """Runs `train(prepare())`. A mistake that `prepare` finds ends the process with exit code 2 before any process
    group starts; a run that stops itself ends with exit code 1; one that was asked to go, and has saved, with 75. An
    error in one process ends all of them, the first error last."""
    log_to_console()
    try:
        ready = prepare()
    except (ValueError, OSError) as error:
        refuse(program, error)
    try:
        train(ready)
    except Damaged as damage:  # which it takes all processes to find
        dist.destroy_process_group()  # before its threads have done anything else, Python's end may abort in them
        refuse(program, damage)
    except RunStopped as stop:
        ending.set()  # the processes end by themselves, each a little later or earlier
        refuse(program, stop, exit_code=STOPPED)
    except Preempted as stop:
        if is_first_process():
            print(f"{program}: {stop}", file=sys.stderr, flush=True)
        end_now(PREEMPTED)  # there is little time
    except Exception:
        logging.exception("this process failed")  # into its own log as well
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        where = (
            f"{program}: rank {dist.get_rank()} on {socket.gethostname()} is the first to fail, with the error above"
        )
        end_after_failure(f"{traceback.format_exc()}{where}")
