"""Gloo workers for tests of parallel layouts.

Importing torch and DeepSpeed takes seconds, so a fork server imports them once and every worker is forked from it. The
server itself never computes: a process that has run threaded operations must not be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

TIMEOUT_S = 180


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(
    rank: int,
    world: int,
    tensor: int,
    pipeline: int,
    port: int,
    results: Connection,
    function: Callable[..., Any],
    arguments: tuple,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    try:
        from beit3_dist.parallel.mesh import connect, read_mesh

        groups = connect(read_mesh(tensor, pipeline))
        results.send(("result", function(groups, *arguments)))
    except BaseException:
        results.send(("error", traceback.format_exc()))
    results.close()
    os._exit(0)  # gloo's threads make an orderly end slow, and nothing is left to do


def run_workers(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    tensor: int = 1,
    pipeline: int = 1,
    timeout_s: int = TIMEOUT_S,
) -> list[Any]:
    """`function(groups, *arguments)` in each of `world` connected processes; their results by rank.

    `function` is importable by name; results are numbers, strings and numpy arrays. The first error of any rank, or a
    hang, fails the test.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "beit3_dist.training.pretraining"])
    port = free_port()
    processes, ends = [], []
    for rank in range(world):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(rank, world, tensor, pipeline, port, send, function, arguments), daemon=True
        )
        process.start()
        send.close()
        processes.append(process)
        ends.append(receive)
    results: dict[int, Any] = {}
    try:
        while len(results) < world:
            ready = wait([end for rank, end in enumerate(ends) if rank not in results], timeout=timeout_s)
            assert ready, (
                f"no rank answered within {timeout_s} s; still missing: {sorted(set(range(world)) - results.keys())}"
            )
            for end in ready:
                rank = ends.index(end)
                try:
                    kind, value = end.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} died without an answer") from None
                assert kind == "result", f"rank {rank} of {world}:\n{value}"
                results[rank] = value
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world)]
