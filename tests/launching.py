"""Programs with the arguments that a user gives, in processes forked from one that has imported what they will import.

Each comes seconds sooner than a new Python. For tests of what a program does, not of how its processes are started.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.parallel.workers import PRELOAD, free_port

TIMEOUT_S = 240


@dataclass
class Ended:
    """Exit codes by rank, and what all processes printed."""

    returncodes: list[int]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """Of the first process that failed, or 0."""
        return next((code for code in self.returncodes if code), 0)


def launch(program: str, *arguments: str, processes: int = 1, timeout_s: float = TIMEOUT_S) -> Ended:
    """What launchers/PROGRAM.py, or the module of a program with a point in it (tools.report), does with these
    arguments. AssertionError where it hangs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with TemporaryDirectory() as folder:
        printed = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        port = free_port()
        ranks = [
            context.Process(target=_rank, args=(rank, processes, port, program, printed, arguments))
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout_s)
        codes = [rank.exitcode for rank in ranks if rank.exitcode is not None]
        for rank in ranks:
            rank.kill()
        out, err = (Path(name).read_text() for name in printed)
    assert len(codes) == processes, f"{program} has not ended within {timeout_s} s:\n{err[-3000:]}"
    return Ended(codes, out, err)


def _rank(rank: int, world: int, port: int, program: str, printed: list[str], arguments: tuple[str, ...]) -> None:
    for number, name in enumerate(printed, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "LOCAL_SIZE": world}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    code = 0
    try:
        module = program if "." in program else f"launchers.{program}"
        code = importlib.import_module(module).main(list(arguments)) or 0
    except SystemExit as end:
        code = int(end.code or 0)
    atexit._run_exitfuncs()  # which multiprocessing leaves out, and loader processes end by
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
