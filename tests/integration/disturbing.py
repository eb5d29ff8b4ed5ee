"""Runs of several processes with faults in them, started again as launchers/slurm/pretrain.sbatch starts them again."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.checkpoint.find import find
from beit3_dist.checkpoint.store import checkpoints
from beit3_dist.config import BatchConfig, CheckpointConfig, GuardConfig, ParallelConfig, RunConfig
from beit3_dist.leaving import ExitCode
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import read_mesh
from beit3_dist.run.endings import STARTED_AGAIN
from beit3_dist.run.launch import launch
from beit3_dist.run.preflight import prepare_run
from beit3_dist.train.pretraining import pretrain
from tests.integration.runs import metrics, reproducible, run_config
from tests.parallel.workers import PRELOAD, free_port

EVERY = 2
"""Steps between two checkpoints."""
STEPS_PER_FAULT = 5
"""From the start of an attempt a fault is at most so many steps away, of which one has a checkpoint at its end."""
STEP_TIMEOUT_S = 20.0
LEFT_S = 15.0
"""What the others have to end by themselves, before a launcher ends them."""
PATIENCE_S = 900.0
SLOW_S = 1.0
LITTLE_DISK = 4096
"""Bytes that a file may have on a full disk."""
ENDING = ("exit", "stop", "full disk", "lost file system")
"""Kinds of faults that end a run: a process is killed, hangs, cannot save, or cannot read its data any more."""
PASSING = ("slow",)
COMPUTING = ("nan", "bit flip")
"""Kinds that change what is computed: a gradient of one rank."""


@dataclass(frozen=True)
class Spread:
    """A layout of a run."""

    data: int
    tensor: int = 1
    pipeline: int = 1
    zero_stage: int = 1

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"dp{self.data}tp{self.tensor}pp{self.pipeline} ZeRO-{self.zero_stage}"


SPREADS = (
    Spread(4, zero_stage=1), Spread(4, zero_stage=3), Spread(2, tensor=2), Spread(2, pipeline=2),
    Spread(2, tensor=2, pipeline=2),
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Happens once, in one rank, in a step counted from 1."""

    kind: str
    rank: int
    step: int
    after: int
    """A checkpoint behind this step is whole before."""
    bit: int = 0
    """Of a gradient's first element, that flips."""


@dataclass
class Disturbed:
    """What became of a run with faults."""

    out: str
    undisturbed: str
    spread: Spread
    faults: list[tuple[Fault, str]] = field(default_factory=list)
    """With what the attempt ended with."""
    computed_alike: bool = True
    """No fault has changed what is computed."""

    def check(self) -> None:
        """Fails unless every step is there once with the samples of the undisturbed run, and each checkpoint is whole;
        where no fault changed a gradient, each bit of the losses is that run's."""
        ours, theirs = metrics(self.out), metrics(self.undisturbed)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        assert [record["sample_hash"] for record in ours] == [record["sample_hash"] for record in theirs]
        if self.computed_alike:
            assert reproducible(self.out) == reproducible(self.undisturbed)
        folder = Path(self.out, "checkpoints")
        assert checkpoints(folder) and all(find(str(path), folder) == path for path in checkpoints(folder).values())
        assert not list(folder.glob("*.partial"))


def attempt(config: RunConfig, spread: Spread, rank: int, port: int, fault: Fault | None, log: str) -> None:
    """What launchers/pretrain.py does after parsing, in a process of its own."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": spread.world, "LOCAL_WORLD_SIZE": spread.world}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"})
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    if fault is not None and fault.rank == rank:
        _prepare(fault, config)
    launch("pretrain.py", lambda: prepare_run(config, read_mesh(spread.tensor, spread.pipeline)), pretrain)


def _prepare(fault: Fault, config: RunConfig) -> None:
    """Has it happen at the beginning of its step, or of the first one behind it that follows a whole checkpoint."""
    done = False
    train_step = Engine.train_step

    def faulty_step(self: Engine, micro_batches: Any, counts: Any, step: int, lr: float) -> Any:
        nonlocal done
        # The batch script starts nobody again who has saved nothing: lets the save beside the training end.
        if not done and step + 1 >= fault.step and newest(config) > fault.after:
            done = True
            _happen(fault, config, self)
        return train_step(self, micro_batches, counts, step, lr)

    Engine.train_step = faulty_step  # type: ignore[method-assign]


def _happen(fault: Fault, config: RunConfig, engine: Engine) -> None:
    if fault.kind == "exit":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "slow":
        time.sleep(SLOW_S)
    elif fault.kind == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LITTLE_DISK, resource.RLIM_INFINITY))
    elif fault.kind == "lost file system":
        _lose_files()
    else:
        _spoil_gradient(fault, engine)


def _lose_files() -> None:
    """Every read of data fails, as of a network file system whose server is gone."""
    from beit3_dist.data import reader

    def lost(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    reader.os.pread = reader.os.preadv = lost  # type: ignore[attr-defined]


def _spoil_gradient(fault: Fault, engine: Engine) -> None:
    """Of the first parameter of this rank, once."""

    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        spoilt = gradient.clone()
        if fault.kind == "nan":
            spoilt.view(-1)[0] = float("nan")
        else:
            spoilt.view(-1).view(torch.int32)[0] ^= torch.tensor(1 << fault.bit, dtype=torch.int64).to(torch.int32)
        return spoilt

    handle = next(p for p in engine.model.parameters() if p.requires_grad).register_hook(spoil)


def start(config: RunConfig, spread: Spread, fault: Fault | None, log: Path) -> list[BaseProcess]:
    """All processes of the run."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=attempt, args=(config, spread, rank, port, fault, str(log)), daemon=True)
        for rank in range(spread.world)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[BaseProcess], log: Path) -> int:
    """The exit code that srun would have, once all have ended: a launcher ends those that stay behind another's end."""
    deadline, first = time.monotonic() + PATIENCE_S, float("inf")
    while any(process.is_alive() for process in processes):
        codes = [process.exitcode for process in processes]
        if any(codes) and first == float("inf"):
            first = time.monotonic()
        if time.monotonic() > min(deadline, first + LEFT_S):
            assert time.monotonic() < deadline, f"the run hangs: {log.read_text()}"
            for process in processes:
                process.kill()
        time.sleep(0.05)
    codes = [process.exitcode or 0 for process in processes]
    return max(code if code >= 0 else 128 - code for code in codes)


def disturb(
    folder: Path, spread: Spread, faults: int, kinds: tuple[str, ...], seed: int = 0,
    tell: Callable[[str], None] = lambda message: None,
) -> Disturbed:  # fmt: skip
    """Runs once undisturbed, and once with so many random faults, one an attempt."""
    config = run_config(
        folder,
        steps=STEPS_PER_FAULT * faults + EVERY,
        batch=BatchConfig(images=8, texts=8, pairs=8, accumulation=2),
        parallel=ParallelConfig(tensor=spread.tensor, pipeline=spread.pipeline, zero_stage=spread.zero_stage),
        checkpoint=CheckpointConfig(every=EVERY, keep=3, resume="auto"),
        guards=GuardConfig(step_timeout_s=STEP_TIMEOUT_S, times_every=EVERY, compare_every=EVERY),
    )
    plain = replace(config, out=str(folder / "undisturbed"))
    own = replace(config, out=str(folder / "disturbed"))
    log = folder / "log.txt"
    assert ended(start(plain, spread, None, log), log) == ExitCode.DONE, log.read_text()
    rng, result = random.Random(seed), Disturbed(own.out, plain.out, spread)
    for _ in range(faults):
        fault = _next(own, spread, kinds, rng)
        before = set(checkpoints(Path(own.out, "checkpoints")))
        code = ended(start(own, spread, fault, log), log)
        new = set(checkpoints(Path(own.out, "checkpoints"))) - before
        what = f"{fault.kind} in rank {fault.rank} at step {fault.step} of {spread}: exit code {code}"
        result.faults.append((fault, what))
        result.computed_alike &= fault.kind not in COMPUTING
        tell(what)
        if code == ExitCode.DONE:
            break
        # (*) For a full disk somebody makes room and starts the job again; the batch script does for all others.
        again = code not in (ExitCode.MISTAKE, ExitCode.STOPPED) and (code in STARTED_AGAIN or new)
        assert again or (fault.kind, code) == ("full disk", ExitCode.STOPPED), f"{what}\n{log.read_text()}"
        assert new, f"{what}: no checkpoint in this attempt\n{log.read_text()}"
    if code != ExitCode.DONE:
        assert ended(start(own, spread, None, log), log) == ExitCode.DONE, log.read_text()
    return result


def newest(config: RunConfig) -> int:
    """Step of the newest whole checkpoint; 0: there is none."""
    return max(checkpoints(Path(config.out, "checkpoints")), default=0)


def _next(config: RunConfig, spread: Spread, kinds: tuple[str, ...], rng: random.Random) -> Fault:
    """A fault behind the first checkpoint of the next attempt."""
    saved = newest(config)
    step = saved + EVERY + rng.randint(1, STEPS_PER_FAULT - EVERY)
    kind, rank = rng.choice(kinds), rng.randrange(spread.world)
    return Fault(kind, rank, step, saved, rng.randrange(31))


def counted(results: list[Disturbed]) -> Counter[str]:
    """Faults by kind."""
    return Counter(fault.kind for result in results for fault, _ in result.faults)
