"""Training, from top to bottom: pretraining, fine-tuning and the image tokenizer's training run this loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import JobConfig
from beit3_dist.data.faults import Fault
from beit3_dist.parallel.device import prepare_device
from beit3_dist.parallel.mesh import Groups, Mesh, connect
from beit3_dist.parallel.phases import Phases
from beit3_dist.run.callbacks import Callback, Callbacks
from beit3_dist.run.checkpointing import Checkpoints, ReadyToTrain, whole_checkpoint
from beit3_dist.run.endings import Preempted
from beit3_dist.run.folder import RunFolder, of_all
from beit3_dist.run.guards import Guards
from beit3_dist.run.guards.collectives import record_collectives
from beit3_dist.run.guards.copies import Held
from beit3_dist.run.guards.watchdog import patience
from beit3_dist.run.lock import RunLock
from beit3_dist.run.preemption import Together, by_itself
from beit3_dist.train.feed import StepBatch
from beit3_dist.train.garbage import GarbageCollection
from beit3_dist.train.profiling import profiled
from beit3_dist.train.schedule import learning_rate

log = logging.getLogger(__name__)


class Step(Protocol):
    """What a step came to."""

    @property
    def skipped(self) -> bool:
        """Whether it has changed nothing, on any rank, because its loss or its gradient was not finite."""


Config = TypeVar("Config", bound=JobConfig)
Result = TypeVar("Result", bound=Step)


class Job(Protocol[Config, Result]):
    """What is trained. The loop knows nothing else of it. Methods with a body are for the jobs that need no other."""

    config: Config
    mesh: Mesh
    state: TrainState
    """Where the run goes on."""
    checkpoint: Path | None
    """The checkpoint that holds its weights; None: a new run."""
    samples: dict[str, int]
    """Stream -> samples of a step."""
    phases: Phases
    """The clock of a step."""
    max_bad_fraction: float | None
    """The run stops itself where a larger share of its samples had to be replaced; None: at no share."""

    def __init__(self, ready: ReadyToTrain) -> None:
        self.config, self.mesh, self.state, self.checkpoint = ready.config, ready.mesh, ready.state, ready.checkpoint
        self.phases = Phases(self.mesh.device)

    def start(self, groups: Groups) -> None:
        """Builds the model in this rank's layout and opens the stream of batches behind `state`. Collective."""

    def shards(self) -> Iterator[Shard]:
        """What this rank saves, so that over all ranks every element is saved once."""

    def load(self, checkpoint: Path) -> None:
        """Fills what `start` has built from a checkpoint of any layout. Collective."""

    def copies(self) -> Iterator[Held]:
        """The weights that this rank computes with, of which others may hold the same."""

    def first_faults(self) -> list[Fault]:
        """What the data had to leave out before the first step."""
        return []

    def next_batch(self, together: Together) -> StepBatch:
        """The next step's micro-batches of this rank, which are read by `together`. Collective."""

    def train_step(self, batch: StepBatch, step: int, lr: float) -> Result:
        """Step number `step` = 0, 1, ...: forward, backward and the optimizer's step. Collective."""

    def record(self, batch: StepBatch, result: Result, lr: float, step_s: float) -> dict[str, Any]:
        """The step's line of metrics.jsonl; the step took `step_s` seconds."""

    def images(self) -> Mapping[str, Tensor]:
        """What trackers show after `state.step`: the first rank's images by name, uint8 [3, H, W]."""
        return {}

    def export(self) -> None:
        """Before every checkpoint: writes what of the run is used while it goes on, and puts into `state` what each
        rank knows for itself until then. Collective."""
        return None

    def evaluation_due(self) -> bool:
        """Whether there is a held-out validation after `state.step`; the same on all ranks."""
        return False

    def evaluate(self, together: Together) -> dict[str, float]:
        """Held-out validation, whose samples are read by `together`; the first rank's scores are recorded, where there
        are any. Collective."""
        return {}

    def shown(self) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        """What trackers show of the last validation: the first rank's images, uint8 [3, H, W], and texts by name."""
        return {}, {}

    def finish(self) -> None:
        """After the last step, its checkpoint whole: writes what else the run leaves. Collective."""
        return None


def train(job: Job[Any, Any], called: Mapping[str, Callback] | None = None) -> None:
    """Trains from `job.state` to `config.steps`. `called`: callbacks beside those of the config, see `Callbacks`.

    Raises Preempted where it was asked to go and has saved, FolderInUse where another run has OUT.
    """
    prepare_device(job.config.deterministic)
    record_collectives()
    groups = connect(job.mesh, patience(job.config.guards.step_timeout_s))
    with RunLock(job.config, job.checkpoint):
        _train(job, groups, Callbacks(job.config.callbacks, called))


def _train(job: Job[Any, Any], groups: Groups, callbacks: Callbacks) -> None:
    config, mesh = job.config, job.mesh
    job.checkpoint, job.state = whole_checkpoint(config, job.checkpoint, job.state)
    state = job.state
    run = RunFolder(Path(config.out), config, mesh, state.step, state.sources)
    guards = Guards(config, groups, run, state, job.max_bad_fraction)
    job.start(groups)
    if mesh.is_first and state.step == 0:
        run.quarantine(0, job.first_faults())
    if job.checkpoint is not None:
        job.load(job.checkpoint)
        log.info("going on after step %d from %s", state.step, job.checkpoint)

    profiling = profiled(config.profile if mesh.is_first else 0, run.folder / "profile", mesh.device)
    checkpoints = Checkpoints(config, run, mesh, state, job.checkpoint, job.shards, job.export, callbacks.on_save)
    with profiling as profile_step, GarbageCollection() as garbage, checkpoints:
        for step in range(state.step, config.steps):
            guards.begin(step + 1)
            started = time.perf_counter()
            job.phases.begin()
            with job.phases("data"):
                batch = job.next_batch(guards.together)
            lr = learning_rate(step, config.steps, config.optim)
            result = job.train_step(batch, step, lr)

            state.advance(job.samples, batch.known.replaced, result.skipped)
            is_last = state.step == config.steps
            if batch.known.replaced and mesh.tensor_rank == mesh.pipeline_rank == 0:  # others have read the same
                faults = [fault for b in batch.micro_batches for fault in b.faults]
                run.quarantine(state.step, of_all(faults, groups.data))
            record = job.record(batch, result, lr, time.perf_counter() - started)
            record["skipped"] = int(result.skipped)
            run.step(record)
            if mesh.is_first:
                callbacks.on_step(record)
            for name, image in job.images().items():
                run.image(state.step, name, image)
            guards.check_step(state, batch.micro_batches, record["loss"], checkpoints)
            guards.check_copies(state, job.copies)
            guards.check_speeds(state.step, job.phases)
            if is_last or state.step % config.checkpoint.every == 0:
                checkpoints.save()
            else:
                checkpoints.check()
            if job.evaluation_due():
                if is_last:
                    checkpoints.wait()  # whatever becomes of the validation, the training is saved
                # The last one is part of what the run leaves: nobody can go on to it.
                if scores := job.evaluate(by_itself if is_last else guards.together):
                    run.evaluation(scored := {"step": state.step} | scores)
                    if mesh.is_first:
                        callbacks.on_validation(scored)
                    run.shown(state.step, *job.shown())
            guards.check_samples(state)
            profile_step()
            garbage.after(state.step)
    if state.step == config.steps:
        guards.begin(state.step)  # it may take as long as a step
        job.finish()
    guards.close()
    run.close()
    if state.step < config.steps:
        raise Preempted(f"asked to go: saved after step {state.step} of {config.steps}")
