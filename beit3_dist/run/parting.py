"""How a training loop is left before its last step: asked to go, or because nothing more can be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.run.checkpointing import Checkpoints
from beit3_dist.run.endings import Preempted, RunStopped
from beit3_dist.run.folder import RunFolder
from beit3_dist.run.preemption import AskedToGo


@contextmanager
def parting(run: RunFolder, checkpoints: Checkpoints, state: TrainState) -> Iterator[None]:
    """Inside, AskedToGo ends the training after `state.step`, whose checkpoint is begun unless it exists; samples that
    RunStopped names are written to the quarantine. Collective."""
    try:
        yield
    except AskedToGo:
        if state.step > checkpoints.newest:
            run.sync()
            checkpoints.save(state)
    except RunStopped as stop:
        run.quarantine(state.step + 1, stop.faults)
        run.sync()
        raise


def check_finished(state: TrainState, steps: int) -> None:
    """At the end of a run: raises Preempted where it was left before its last step."""
    if state.step < steps:
        raise Preempted(f"asked to go: saved after step {state.step} of {steps}")
