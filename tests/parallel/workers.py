"""Workers for tests of parallel layouts: of gloo on the CPU, of NCCL with BEIT3_TEST_DEVICE=cuda.

Importing torch and DeepSpeed takes seconds, so a fork server imports them once and every worker is forked from it. The
server itself never computes: a process that has run threaded operations must not be forked. Nor one that has asked for
CUDA devices, as importing DeepSpeed does, so there every worker imports them itself.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch

from tests.device import DEVICE, ON_GPU

TIMEOUT_S = 400
PRELOAD = ["tests.parallel.preload"]
"""What the fork server imports, of which there is one for all tests of a process."""


def free_port() -> int:
    """A port that nobody uses, below those that Linux gives to connections, which would take it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def _work(rank: int, world: int, tensor: int, pipeline: int, port: int, tasks: Connection) -> None:
    """A worker's life: connect, then (function, arguments) in and ("result" or "error", value) out, until the pipe is
    closed."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        LOCAL_SIZE=str(world),  # or DeepSpeed starts a program to count devices, at every reduction
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR=DEVICE.type,
    )
    torch.set_num_threads(1)
    try:
        from beit3_dist.parallel.mesh import connect, read_mesh

        groups = connect(read_mesh(tensor, pipeline))
        while True:
            function, arguments = tasks.recv()
            tasks.send(("result", function(groups, *arguments)))
            gc.collect()  # engines are circles of references; those of whole runs stay frozen, and are small
            gc.freeze()
    except EOFError:
        pass
    except BaseException:
        tasks.send(("error", traceback.format_exc()))
    tasks.close()
    os._exit(0)  # gloo's threads make an orderly end slow, and nothing is left to do


class Workers:
    """`world` connected processes that run one function after the other. A context: they end with it.

    After an error or a hang they are of no more use: `failed`.
    """

    def __init__(self, world: int, tensor: int = 1, pipeline: int = 1) -> None:
        if ON_GPU and world > torch.cuda.device_count():
            pytest.skip(f"needs {world} GPUs, one for each process")
        context: Any = multiprocessing.get_context("spawn" if ON_GPU else "forkserver")
        if not ON_GPU:
            context.set_forkserver_preload(PRELOAD)
        port = free_port()
        self.failed = False
        self._processes, self._ends = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world, tensor, pipeline, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(ours)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for end in self._ends:
            end.close()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: int = TIMEOUT_S) -> list[Any]:
        """`function(groups, *arguments)` in each process; their results by rank. See `run_workers`."""
        self.failed, world = True, len(self._ends)
        for end in self._ends:
            end.send((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < world:
            ready = wait([end for rank, end in enumerate(self._ends) if rank not in results], timeout=timeout_s)
            assert ready, (
                f"no rank answered within {timeout_s} s; still missing: {sorted(set(range(world)) - results.keys())}"
            )
            for end in ready:
                rank = self._ends.index(end)
                try:
                    kind, value = end.recv()
                except (EOFError, ConnectionResetError):
                    raise AssertionError(f"rank {rank} died without an answer") from None
                assert kind == "result", f"rank {rank} of {world}:\n{value}"
                results[rank] = value
        self.failed = False
        return [results[rank] for rank in range(world)]


def run_workers(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    tensor: int = 1,
    pipeline: int = 1,
    timeout_s: int = TIMEOUT_S,
) -> list[Any]:
    """`function(groups, *arguments)` in each of `world` connected processes of its own; their results by rank.

    `function` is importable by name; results are numbers, strings and numpy arrays. The first error of any rank, or a
    hang, fails the test.
    """
    with Workers(world, tensor, pipeline) as workers:
        return workers.run(function, *arguments, timeout_s=timeout_s)


class KeptWorkers:
    """The workers of one mesh at a time, kept from case to case: starting them takes longer than many a case.

    Whoever makes it closes it.
    """

    def __init__(self) -> None:
        self._workers: Workers | None = None
        self._mesh: tuple[int, int, int] | None = None

    def of(self, world: int, tensor: int, pipeline: int) -> Workers:
        """Connected workers of this mesh: the ones of the case before where it fits and has not failed."""
        if self._workers is None or self._workers.failed or self._mesh != (world, tensor, pipeline):
            self.close()
            self._workers, self._mesh = Workers(world, tensor, pipeline), (world, tensor, pipeline)
        return self._workers

    def close(self) -> None:
        """Ends the workers that are left."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
