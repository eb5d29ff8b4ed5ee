"""A process that is killed again and again, at any moment, ends as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from beit3_dist.config import BatchConfig, CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.parallel.mesh import read_mesh
from beit3_dist.training.preflight import prepare_run
from beit3_dist.training.pretraining import pretrain
from tests.integration.runs import metrics, reproducible, run_config
from tests.parallel.workers import free_port
from tests.unit.tar_fixtures import picture, write_tar
from tools import verify_order

KILLS = 20


def attempt(config: RunConfig, port: int, answer: Connection) -> None:
    """What launchers/pretrain.py does after parsing, in a process of its own."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(single | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"})
    torch.set_num_threads(1)
    mesh = read_mesh()
    pretrain(config, mesh, prepare_run(config, mesh))
    answer.send("done")
    answer.close()
    os._exit(0)  # gloo's threads make an orderly end slow, and nothing is left to do


def start(config: RunConfig) -> tuple[BaseProcess, Connection]:
    """One process of the run, from the fork server that has imported everything, and where its answer comes from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "deepspeed", "beit3_dist.training.pretraining"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(config, free_port(), send), daemon=True)
    process.start()
    send.close()
    return process, receive


def finish(config: RunConfig) -> None:
    """The run to its end."""
    process, answer = start(config)
    assert answer.poll(120), "the run hangs"
    assert answer.recv() == "done"
    process.join()


@pytest.mark.slow
def test_killed_twenty_times_at_random(tmp_path: Path) -> None:
    """SIGKILL between the first moment of an attempt and some steps after its first; a checkpoint every second step.

    A crash of the machine may also cut the last line short: before every third attempt the file gets half a line.
    """
    config = run_config(
        tmp_path,
        steps=70,
        batch=BatchConfig(images=2, texts=2, pairs=2),
        parallel=ParallelConfig(zero_stage=1),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    broken = [{"__key__": f"{n}", "png": b"not a picture" if n % 3 == 0 else picture(n)} for n in range(6)]
    write_tar(tmp_path / "broken.tar", broken)
    data = replace(config.data, images=str(tmp_path / "broken.tar"), max_bad_fraction=1.0)
    whole = replace(config, data=data, out=str(tmp_path / "whole"))
    killed = replace(whole, out=str(tmp_path / "killed"), checkpoint=replace(config.checkpoint, resume="auto"))
    finish(whole)

    rng = random.Random(0)
    log = Path(killed.out, "metrics.jsonl")
    moments = []
    for attempt in range(KILLS):
        before = len(log.read_bytes().splitlines()) if log.exists() else 0
        if before and attempt % 3 == 0:
            with open(log, "a") as file:
                file.write('{"step": 1')
        process, _ = start(killed)
        if attempt % 4:  # Somewhere in the steps, a checkpoint or an evaluation: three to six lines more, and a bit.
            deadline, more, size = time.monotonic() + 60, rng.randint(1, 4), log.stat().st_size if log.exists() else 0
            seen, old = 0, -1
            while seen < more and time.monotonic() < deadline and process.is_alive():
                size = log.stat().st_size if log.exists() else 0
                seen, old = seen + (old >= 0 and size > old), size
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        else:  # While it starts, reads the checkpoint, or cuts the file back.
            time.sleep(rng.uniform(0, 1.0))
        assert process.is_alive(), "the run ended before it was killed"
        process.kill()
        process.join()
        moments.append(len(log.read_bytes().splitlines()) if log.exists() else 0)
    finish(killed)

    assert moments[-1] > 10, f"hardly a step was taken between the kills: {moments}"
    assert [record["step"] for record in metrics(killed.out)] == list(range(1, config.steps + 1))
    assert reproducible(killed.out) == reproducible(whole.out)

    def faults(out: str) -> list[str]:
        return [json.dumps(json.loads(line)) for line in Path(out, "quarantine.jsonl").read_text().splitlines()]

    assert faults(killed.out) == faults(whole.out) != []
    assert verify_order.main([killed.out]) == 0
    assert not [name for name in os.listdir(Path(killed.out, "checkpoints")) if name.endswith(".partial")]
