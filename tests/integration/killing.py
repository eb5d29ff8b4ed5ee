"""A small run of one process that is killed again and again, compared with one that nobody disturbs."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from beit3_dist.config import BatchConfig, CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.parallel.mesh import read_mesh
from beit3_dist.run.preflight import prepare_run
from beit3_dist.train.pretraining import pretrain
from tests.integration.runs import metrics, reproducible, run_config
from tests.parallel.workers import PRELOAD, free_port
from tests.unit.tar_fixtures import picture, write_tar
from tools import verify_order

STEPS_PER_KILL = 3.5
"""Steps that a run needs, or it ends before it was killed so often: about two of an attempt come into a checkpoint."""
PATIENCE_S = 600.0
"""How long a whole run may take, and an attempt until its next step."""


def attempt(config: RunConfig, port: int, answer: Connection) -> None:
    """What launchers/pretrain.py does after parsing, in a process of its own."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(single | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"})
    torch.set_num_threads(1)
    mesh = read_mesh()
    pretrain(prepare_run(config, mesh))
    answer.send("done")
    answer.close()
    os._exit(0)  # gloo's threads make an orderly end slow, and nothing is left to do


def start(config: RunConfig) -> tuple[BaseProcess, Connection]:
    """One process of the run, from the fork server that has imported everything, and where its answer comes from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(config, free_port(), send), daemon=True)
    process.start()
    send.close()
    return process, receive


def finish(config: RunConfig) -> None:
    """The run to its end."""
    process, answer = start(config)
    assert answer.poll(PATIENCE_S), "the run hangs"
    assert answer.recv() == "done"
    process.join()


@dataclass
class Killed:
    """What became of a run that was killed so often."""

    killed: str
    """Its OUT."""
    undisturbed: str
    """OUT of the run that nobody disturbed."""
    steps: int
    """Of each."""
    moments: Counter[str] = field(default_factory=Counter)
    """What the run was doing when it was killed: starting, saving or training."""
    steps_by_kill: list[int] = field(default_factory=list)
    """Steps in metrics.jsonl at each kill."""

    def check(self) -> None:
        """Fails unless every step is there once and is, in every bit, that of the undisturbed run; so are the samples
        that were replaced, and nothing half-written is left."""
        assert [record["step"] for record in metrics(self.killed)] == list(range(1, self.steps + 1))
        assert reproducible(self.killed) == reproducible(self.undisturbed)
        faults, expected = (Path(out, "quarantine.jsonl").read_text() for out in (self.killed, self.undisturbed))
        assert faults == expected != ""
        assert verify_order.main([self.killed]) == 0
        assert not list(Path(self.killed, "checkpoints").glob("*.partial"))


def kill_at_random(
    folder: Path, kills: int, seed: int = 0, tell: Callable[[str], None] = lambda message: None
) -> Killed:
    """Runs once undisturbed, and once with SIGKILL between the first moment of an attempt and some steps after its
    first; a checkpoint every second step, a third of the pictures broken.

    A crash of the machine may also cut the last line short: before every third attempt the file gets half a line.
    """
    config = run_config(
        folder,
        steps=round(STEPS_PER_KILL * kills),
        batch=BatchConfig(images=2, texts=2, pairs=2),
        parallel=ParallelConfig(zero_stage=1),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
    broken = [{"__key__": f"{n}", "png": b"not a picture" if n % 3 == 0 else picture(n)} for n in range(6)]
    write_tar(folder / "broken.tar", broken)
    data = replace(config.data, images=str(folder / "broken.tar"), max_bad_fraction=1.0)
    whole = replace(config, data=data, out=str(folder / "whole"))
    killed = replace(whole, out=str(folder / "killed"), checkpoint=replace(config.checkpoint, resume="auto"))
    finish(whole)

    rng, result = random.Random(seed), Killed(killed.out, whole.out, config.steps)
    log, newest = Path(killed.out, "metrics.jsonl"), Path(killed.out, "checkpoints", "latest")

    def whole_checkpoint() -> str:
        return newest.read_text() if newest.exists() else ""

    def steps() -> int:
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    def size() -> int:
        return log.stat().st_size if log.exists() else 0

    for number in range(kills):
        if steps() and number % 3 == 0:
            with open(log, "a") as file:
                file.write('{"step": 1')
        process, _ = start(killed)
        seen = 0
        if number % 4:  # Somewhere in the steps, a checkpoint or an evaluation: some lines more, and a bit.
            deadline, more, old = time.monotonic() + PATIENCE_S, rng.randint(1, 4), -1
            before = whole_checkpoint() if number % 4 == 1 else None  # some get one further, however busy the disk
            while (seen < more or whole_checkpoint() == before) and time.monotonic() < deadline and process.is_alive():
                seen, old = seen + (old >= 0 and size() > old), size()
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        else:  # While it starts, reads the checkpoint, or cuts the file back: at the latest at its first line.
            deadline, old = time.monotonic() + rng.uniform(0, 1.0), size()
            while time.monotonic() < deadline and size() <= old:
                old = size()
                time.sleep(0.002)
        assert process.is_alive(), "the run ended before it was killed"
        process.kill()
        process.join()
        saving = any(Path(killed.out, "checkpoints").glob("*.partial"))
        result.moments["saving" if saving else "training" if seen else "starting"] += 1
        result.steps_by_kill.append(steps())
        if (number + 1) % 10 == 0:
            tell(f"{number + 1} of {kills} kills, {steps()} of {config.steps} steps")
    finish(killed)
    return result
