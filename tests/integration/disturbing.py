"""Runs of several processes with faults in them, started again as launchers/slurm/pretrain.sbatch starts them again."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from beit3_dist.checkpoint.find import find
from beit3_dist.checkpoint.store import checkpoints
from beit3_dist.config import BatchConfig, CheckpointConfig, GuardConfig, ParallelConfig, RunConfig
from beit3_dist.leaving import ExitCode
from beit3_dist.parallel.mesh import read_mesh
from beit3_dist.run.launch import launch
from beit3_dist.run.preflight import prepare_run
from beit3_dist.train.pretraining import pretrain
from tests.integration.faulty import COMPUTING, ENDING, Fault, Faults, meet, newest
from tests.integration.runs import metrics, reproducible, run_config
from tests.parallel.workers import PRELOAD, free_port

EVERY = 2
"""Steps between two checkpoints."""
APART = 3
"""A fault is at most so many steps behind the one before."""
STEPS_PER_FAULT = 4
"""Some more: one that ends the run waits for a checkpoint."""
PASSED = 2
"""An attempt meets at most so many faults that it survives."""
TIMES_EVERY = 10
"""Steps between two comparisons of the ranks' speeds, each of which takes a CPU as long as two steps."""
PATIENCE_S = 900.0
"""How long an attempt may say nothing, and a step take in which no rank stops: the machine may be busy."""
LEFT_S = 180.0
"""The others must end by themselves so long after the first one. The batch script's srun ends them after a minute, on a
machine that has a core for each."""
UNEQUAL = "copies of weights are no longer equal"


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
class Met:
    """A fault, in the step in which it happened, and what became of the run."""

    fault: Fault
    became: str


@dataclass
class Disturbed:
    """What became of a run with faults."""

    out: str
    undisturbed: str
    spread: Spread
    met: list[Met] = field(default_factory=list)
    lasting: list[Fault] = field(default_factory=list)
    """Those that changed what is computed, in steps that were saved and not done again."""
    apart_from: int | None = None
    """In this step a bit flip has made tensor ranks' copies differ, and lasted: where the run was started again behind
    it, it went on with one of them. No later step has to be one of the other run's in its bits."""

    def check(self) -> None:
        """Fails unless every step is there once and is, in every bit, that of the other run, which met no other faults
        than the lasting ones; and unless each checkpoint is whole."""
        ours, theirs = metrics(self.out), metrics(self.undisturbed)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        assert [record["sample_hash"] for record in ours] == [record["sample_hash"] for record in theirs]
        alike = slice(None if self.apart_from is None else self.apart_from - 1)
        assert reproducible(self.out)[alike] == reproducible(self.undisturbed)[alike]
        folder = Path(self.out, "checkpoints")
        assert checkpoints(folder) and all(find(str(path), folder) == path for path in checkpoints(folder).values())
        assert not list(folder.glob("*.partial"))


def attempt(config: RunConfig, spread: Spread, rank: int, port: int, faults: Faults, log: Path) -> None:
    """What launchers/pretrain.py does after parsing, in a process of its own."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": spread.world, "LOCAL_WORLD_SIZE": spread.world}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"})
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    meet(faults, rank)
    launch("pretrain.py", lambda: prepare_run(config, read_mesh(spread.tensor, spread.pipeline)), pretrain)


def run(config: RunConfig, spread: Spread, faults: Faults, log: Path) -> int:
    """All processes of an attempt, to their end. The exit code that srun would have."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=attempt, args=(config, spread, rank, port, faults, log), daemon=True)
        for rank in range(spread.world)
    ]
    for process in processes:
        process.start()
    codes = _ended(processes, faults, log)
    return max(code if code >= 0 else 128 - code for code in codes)


def _ended(processes: Sequence[BaseProcess], faults: Faults, log: Path) -> list[int]:
    """The exit codes by rank: all processes end by themselves, but one that is stopped."""
    first_s, said, said_s = float("inf"), -1, time.monotonic()
    while left := {rank for rank, process in enumerate(processes) if process.is_alive()}:
        now_s, length = time.monotonic(), log.stat().st_size if log.exists() else 0
        if any(process.exitcode for process in processes):
            first_s = min(first_s, now_s)
        if length > said:
            said, said_s = length, now_s
        if left == {fault.rank for fault in faults.happened() if fault.kind == "stop"}:
            processes[left.pop()].kill()
        if now_s > min(first_s + LEFT_S, said_s + PATIENCE_S):
            for process in processes:
                process.kill()
            raise AssertionError(f"ranks {sorted(left)} do not end, {faults.happened()}\n{log.read_text()}")
        time.sleep(0.05)
    return [process.exitcode or 0 for process in processes]


def disturb(
    folder: Path, spread: Spread, faults: int, kinds: tuple[str, ...], seed: int = 0,
    tell: Callable[[str], None] = lambda message: None,
) -> Disturbed:  # fmt: skip
    """Runs with so many random faults, several an attempt, or fewer where the run is done before it has met them; and
    once with none but those whose mark it has kept."""
    config = run_config(
        folder,
        steps=STEPS_PER_FAULT * faults + EVERY,
        batch=BatchConfig(images=8, texts=8, pairs=8, accumulation=2),
        parallel=ParallelConfig(tensor=spread.tensor, pipeline=spread.pipeline, zero_stage=spread.zero_stage),
        checkpoint=CheckpointConfig(every=EVERY, keep=3, resume="auto"),
        guards=GuardConfig(step_timeout_s=PATIENCE_S, times_every=TIMES_EVERY, compare_every=EVERY),
    )
    own, other = (replace(config, out=str(folder / name)) for name in ("disturbed", "undisturbed"))
    rng, result, code, attempts = random.Random(seed), Disturbed(own.out, other.out, spread), -1, 0
    while code != ExitCode.DONE:
        attempts += 1
        saved = newest(own.out)
        planned = _plan(saved, spread, kinds, faults - len(result.met), rng)
        meant = Faults(planned, own.out, saved, folder / f"told-{attempts}")
        log = folder / f"log-{attempts}.txt"
        code = run(own, spread, meant, log)
        for met in _judge(code, meant, log, result):
            result.met.append(met)
            tell(f"{met.fault.kind} in rank {met.fault.rank} at step {met.fault.step} of {spread}: {met.became}")
    log = folder / "log-undisturbed.txt"
    code = run(other, spread, Faults(tuple(result.lasting), other.out, 0, folder / "told-undisturbed"), log)
    assert code == ExitCode.DONE, log.read_text()
    return result


def _plan(saved: int, spread: Spread, kinds: Sequence[str], most: int, rng: random.Random) -> tuple[Fault, ...]:
    """Faults of an attempt that goes on behind step `saved`: at most so many, of which the last one ends it."""
    if most == 0:
        return ()
    passing = [kind for kind in kinds if kind not in ENDING]
    drawn = [rng.choice(passing) for _ in range(min(rng.randint(0, PASSED), most - 1))] if passing else []
    drawn.append(rng.choice([kind for kind in kinds if kind in ENDING]))
    step, planned = saved, []
    for kind in drawn:
        step += rng.randint(1, APART)
        rank = rng.randrange(spread.world)
        if kind == "lost file system":
            rank -= rank % spread.tensor  # the first of tensor ranks reads for all
        planned.append(Fault(kind, rank, step, rng.randrange(31)))
    return tuple(planned)


def _judge(code: int, faults: Faults, log: Path, result: Disturbed) -> list[Met]:
    """What became of the faults of an attempt, which has ended with this exit code. Fails where none of them explains
    that, and where nobody would start the run again."""
    happened, said, became = faults.happened(), log.read_text(), dict[Fault, str]()
    for fault in happened:
        became[fault] = _mark(fault, code, result) if fault.kind in COMPUTING else "went on"
    if code != ExitCode.DONE:
        unequal = UNEQUAL in said and result.spread.tensor > 1
        enders = [fault for fault in happened if fault.kind in (("bit flip",) if unequal else ENDING)]
        assert enders, f"exit code {code} after {happened}\n{said}"
        became |= {fault: "came when the run ended" for fault in happened if fault.kind in ENDING}
        # As launchers/slurm/pretrain.sbatch does. After a full disk somebody makes room, for unequal copies leaves a
        # host out, and starts the job again.
        by_script = code not in (ExitCode.MISTAKE, ExitCode.STOPPED) and newest(faults.out) > faults.saved
        by_hand = code == ExitCode.STOPPED and (unequal or enders[-1].kind == "full disk")
        assert by_script or by_hand, f"exit code {code} after {happened}\n{said}"
        became[enders[-1]] = f"exit code {code}, started again {'by the script' if by_script else 'by hand'}"
    return [Met(fault, became[fault]) for fault in happened]


def _mark(fault: Fault, code: int, result: Disturbed) -> str:
    """What became of a fault that changes what is computed; notes in the result what mark it has left."""
    if code != ExitCode.DONE and newest(result.out) < fault.step:
        return "went on, until the step was done again"
    # This line alone: a full disk may have cut off the last one, which the next attempt mends.
    lines = Path(result.out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    left_out = bool(json.loads(lines[fault.step - 1])["skipped"])
    assert left_out or fault.kind != "nan"
    if left_out or result.spread.tensor == 1:
        result.lasting.append(fault)
    else:
        result.apart_from = min(fault.step, result.apart_from or fault.step)
    return "went on, the step was left out" if left_out else "went on"
