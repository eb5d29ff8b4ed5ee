"""A step that hangs is told of whatever it is that hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from beit3_dist.leaving import ExitCode
from beit3_dist.parallel.mesh import read_mesh
from beit3_dist.run.guards.watchdog import Watchdog
from tests.parallel.workers import PRELOAD, free_port


def hang(rank: int, port: int, folder: Path) -> None:
    """One of two processes, of which the first one, with the store, stops as a process on a frozen node does."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"})
    os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo")
    watchdog = Watchdog(0.5, read_mesh(), folder / f"log-{rank}")
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    watchdog.begin(1)
    time.sleep(600)


@pytest.mark.slow
def test_a_stopped_process_that_holds_the_store_is_told_of(tmp_path: Path) -> None:
    """And the others end by themselves, with all stacks."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(PRELOAD)
    first, other = (context.Process(target=hang, args=(rank, port, tmp_path), daemon=True) for rank in range(2))
    try:
        first.start()
        other.start()
        other.join(300)
        assert first.is_alive() and other.exitcode == ExitCode.FAILED
    finally:
        for process in (first, other):
            process.kill()
            process.join()
    said, log = ((tmp_path / name).read_text() for name in ("said-1", "log-1"))
    assert "step 1 has taken longer than guards.step_timeout_s=0.5" in said and "Rank 0 may be the one" in said, said
    assert "most recent call first" in log
