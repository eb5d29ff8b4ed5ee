"""Faults that a process of a run meets, each in a step of its own."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.checkpoint.store import checkpoints
from beit3_dist.parallel.engine import Engine
from beit3_dist.run.guards.watchdog import Watchdog

ENDING = ("exit", "stop", "full disk", "lost file system")
"""Kinds of faults that end a run: a process is killed, hangs, cannot save, or cannot read its data any more."""
COMPUTING = ("nan", "bit flip")
"""Kinds that change what is computed: a gradient of one rank."""
PASSING = ("slow", *COMPUTING)
"""Kinds that a run survives; but where tensor ranks hold copies of what a bit flip has changed, that ends it, too."""
SLOW_S = 1.0
LITTLE_DISK = 4096
"""Bytes that a file may have on a full disk."""
STOPPED_S = 5.0
"""`guards.step_timeout_s` of the step in which a process stops, and of no other: a busy machine may take its time."""


@dataclass(frozen=True)
class Fault:
    """Happens once, in one rank, at the beginning of a step counted from 1."""

    kind: str
    rank: int
    step: int
    """One that ends the run comes later where no checkpoint of this attempt is whole before it."""
    bit: int = 0
    """Of a gradient's first element, that flips."""


@dataclass(frozen=True)
class Faults:
    """What the processes of one attempt meet."""

    planned: tuple[Fault, ...]
    out: str
    """Run folder."""
    saved: int
    """Step of the newest checkpoint before the attempt; 0: there is none."""
    told: Path
    """A file with a line for each fault that happens."""

    @property
    def stopping(self) -> Path:
        """A file that is there once a process is about to stop, in its next step."""
        return self.told.with_suffix(".stopping")

    def happened(self) -> list[Fault]:
        """In this order, in these steps."""
        lines = self.told.read_text().splitlines() if self.told.exists() else []
        numbers_and_steps = [json.loads(line) for line in lines]
        return [replace(self.planned[number], step=step) for number, step in numbers_and_steps]

    def tell(self, fault: Fault, step: int) -> None:
        with open(self.told, "a", encoding="utf-8") as file:
            file.write(f"[{self.planned.index(fault)}, {step}]\n")


def newest(out: str) -> int:
    """Step of the newest whole checkpoint of a run folder; 0: there is none."""
    return max(checkpoints(Path(out, "checkpoints")), default=0)


def meet(faults: Faults, rank: int) -> None:
    """Has this process meet its own ones, and lose patience where another one stops."""
    mine = [fault for fault in faults.planned if fault.rank == rank]
    passing = {fault.step: [fault] for fault in mine if fault.kind not in ENDING}
    ending = [fault for fault in mine if fault.kind in ENDING]
    next_step: list[Fault] = []
    train_step, begin = Engine.train_step, Watchdog.begin

    def faulty_step(self: Engine, micro_batches: Any, counts: Any, step: int, lr: float) -> Any:
        number = step + 1
        for fault in (*next_step, *passing.get(number, ())):
            faults.tell(fault, number)
            _happen(fault, self)
        next_step.clear()
        # The batch script starts nobody again who has saved nothing: lets the save beside the training end. No rank
        # ends this step before this one has come to it, so that all know before the next one that it has none for long.
        if ending and ending[0].step <= number + 1 and newest(faults.out) > faults.saved:
            next_step.append(ending.pop())
            if next_step[0].kind == "stop":
                faults.stopping.touch()
        return train_step(self, micro_batches, counts, step, lr)

    def impatient_begin(self: Watchdog, step: int) -> None:
        if faults.stopping.exists():
            self._limit_s = STOPPED_S
        begin(self, step)

    Engine.train_step = faulty_step  # type: ignore[method-assign]
    Watchdog.begin = impatient_begin  # type: ignore[method-assign]


def _happen(fault: Fault, engine: Engine) -> None:
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

    reader.PAUSES = ()  # each shard would be tried for eleven seconds
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
