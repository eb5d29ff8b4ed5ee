"""What every launcher does with a parsed config: check and open everything, then train, and end with one clear line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from beit3_dist.checkpoint.find import Damaged
from beit3_dist.command_line import STOPPED, log_to_console, refuse
from beit3_dist.training.resilience import RunStopped

Ready = TypeVar("Ready")


def launch(program: str, prepare: Callable[[], Ready], train: Callable[[Ready], None]) -> None:
    """Runs `train(prepare())`. A mistake that `prepare` finds ends the process with exit code 2 before any process
    group starts; a run that stops itself ends with exit code 1."""
    log_to_console()
    try:
        ready = prepare()
    except (ValueError, OSError) as error:
        refuse(program, error)
    try:
        train(ready)
    except Damaged as damage:  # which it takes all ranks to find
        refuse(program, damage)
    except RunStopped as stop:
        refuse(program, stop, exit_code=STOPPED)
    except Exception:
        logging.exception("this process failed")  # into its own log as well
        raise
