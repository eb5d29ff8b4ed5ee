"""What a run watches itself for while it trains: bad steps, loss spikes, hanging steps, a signal that it must go."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path

from beit3_dist.checkpoint.store import checkpoints
from beit3_dist.config import TrainingConfig
from beit3_dist.parallel.mesh import Groups
from beit3_dist.training.feed import StepBatch
from beit3_dist.training.metrics import from_the_end
from beit3_dist.training.preemption import StopRequest
from beit3_dist.training.resilience import RunStopped
from beit3_dist.training.run_folder import RunFolder, of_all
from beit3_dist.training.spikes import SpikeMonitor
from beit3_dist.training.watchdog import Watchdog

log = logging.getLogger(__name__)


class Guards:
    """Every process has one, from before its model is built until its last step."""

    def __init__(self, config: TrainingConfig, groups: Groups, run: RunFolder) -> None:
        settings, self._out, mesh = config.guards, Path(config.out), groups.mesh
        self._groups, self._run, self._most = groups, run, settings.max_skipped_steps
        self._watchdog = Watchdog(settings.step_timeout_s, mesh, run.log_file)
        self._request = StopRequest(mesh.device)
        self._in_a_row = 0
        self._spikes = None
        if mesh.is_first and settings.spike_factor:
            losses = last_losses(self._out / "metrics.jsonl", settings.spike_window)
            self._spikes = SpikeMonitor(settings.spike_window, settings.spike_factor, losses)

    def begin(self, step: int) -> None:
        """Step number `step` = 1, 2, ... begins."""
        self._watchdog.begin(step)

    def check(self, step: int, batch: StepBatch, loss: float, skipped: bool) -> bool:
        """After a step, its record written: whether the run was asked to go, and so must save and end. Collective.

        Raises RunStopped, on all ranks, after too many skipped steps in a row.
        """
        if skipped:
            self._count(step, batch)
        else:
            self._in_a_row = 0
            if self._spikes and (warning := self._spikes.check(step, loss)):
                log.warning(warning)
        return self._request.agreed()

    def close(self) -> None:
        """The run is over."""
        self._watchdog.close()
        self._request.close()

    def _count(self, step: int, batch: StepBatch) -> None:
        self._in_a_row += 1
        mesh = self._groups.mesh
        if mesh.tensor_rank == mesh.pipeline_rank == 0:  # others have the same samples
            self._run.skipped(step, of_all([sample_ids(batch)], self._groups.data))
        report = self._out / "skipped.jsonl"
        log.warning("step %d was skipped: its loss or gradient is not finite; %s names its samples", step, report)
        if self._in_a_row == self._most:
            good = list(checkpoints(self._out / "checkpoints").values())
            raise RunStopped(
                f"guards.max_skipped_steps={self._most}: loss or gradient was not finite in so many steps in a row, "
                f"the last of them step {step}; {report} names their samples; the last good checkpoint is "
                f"{good[-1] if good else 'not there yet'}: go on from it with a lower optim.lr or other data"
            )


def sample_ids(batch: StepBatch) -> dict[str, list[int]]:
    """Ids of this process's samples by stream (fine-tuning: of its examples)."""
    ids: dict[str, list[int]] = {}
    for micro_batch in batch.micro_batches:
        for kind, some in micro_batch.ids_by_kind().items():
            ids.setdefault(kind, []).extend(some)
    return ids


def last_losses(metrics: Path, count: int) -> list[float]:
    """The losses of the last `count` steps in metrics.jsonl that were not skipped."""
    if not metrics.exists():
        return []
    records = map(json.loads, from_the_end(metrics))
    losses = list(islice((record["loss"] for record in records if not record["skipped"]), count))
    return losses[::-1]
