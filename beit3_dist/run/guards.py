"""What a run watches itself for while it trains: bad steps, loss spikes, hanging steps, a signal that it must go."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import TrainingConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.bad_samples import RunStopped
from beit3_dist.run.checkpointing import Checkpoints
from beit3_dist.run.folder import RunFolder, of_all
from beit3_dist.run.preemption import Read, StopRequest
from beit3_dist.run.records import from_the_end
from beit3_dist.run.spikes import SpikeMonitor
from beit3_dist.run.watchdog import Watchdog

log = logging.getLogger(__name__)


class HasIds(Protocol):
    """A micro-batch that knows its samples."""

    def ids_by_kind(self) -> Mapping[str, list[int]]:
        """Ids of the samples by the name of their stream."""


class Guards:
    """Every process has one, from before its model is built until its last step."""

    def __init__(self, config: TrainingConfig | TokenizerConfig, groups: Groups, run: RunFolder) -> None:
        settings, self._out, mesh = config.guards, Path(config.out), groups.mesh
        self._groups, self._run, self._most = groups, run, settings.max_skipped_steps
        self._last_step = config.steps
        self._watchdog = Watchdog(settings.step_timeout_s, mesh, run.log_file)
        self._request = StopRequest(mesh.device)
        self._spikes = None
        if mesh.is_first and settings.spike_factor:
            losses = last_losses(self._out / "metrics.jsonl", settings.spike_window)
            self._spikes = SpikeMonitor(settings.spike_window, settings.spike_factor, losses)

    def begin(self, step: int) -> None:
        """Step number `step` = 1, 2, ... begins."""
        self._watchdog.begin(step)

    def together(self, read: Callable[[], Read]) -> Read:
        """What `read` gives in this process; see `StopRequest.together`. Collective."""
        return self._request.together(read)

    def check(self, state: TrainState, micro_batches: Sequence[HasIds], loss: float, checkpoints: Checkpoints) -> None:
        """After a step, its record written. Raises RunStopped, on all ranks, after too many skipped steps in a row."""
        if state.skipped_in_a_row:
            self._report_skipped(state, micro_batches, checkpoints)
        elif self._spikes and (warning := self._spikes.check(state.step, loss)):
            log.warning(warning)

    def close(self) -> None:
        """The run is over."""
        self._watchdog.close()
        self._request.close()

    def _report_skipped(self, state: TrainState, micro_batches: Sequence[HasIds], checkpoints: Checkpoints) -> None:
        mesh, in_a_row, report = self._groups.mesh, state.skipped_in_a_row, self._out / "skipped.jsonl"
        if mesh.tensor_rank == mesh.pipeline_rank == 0:  # others have the same samples
            self._run.skipped(state.step, of_all([sample_ids(micro_batches)], self._groups.data))
        log.warning("step %d was skipped: its loss or gradient is not finite; %s names its samples", state.step, report)
        if in_a_row < self._most and state.step < self._last_step:
            return
        good = checkpoints.last_good(state)
        last = (
            f"the last good checkpoint is {good}: go on from it by --checkpoint.resume {good}"
            if good
            else ("there is no good checkpoint: start anew")
        )
        if in_a_row >= self._most:
            raise RunStopped(
                f"guards.max_skipped_steps={self._most}: loss or gradient was not finite in so many steps in a row, "
                f"the last of them step {state.step}; {report} names their samples; {last}, with a lower optim.lr or "
                "other data"
            )
        log.warning("the run ends with %d skipped steps, so that its last weights are untried; %s", in_a_row, last)


def sample_ids(micro_batches: Sequence[HasIds]) -> dict[str, list[int]]:
    """Ids of this process's samples by stream (fine-tuning: of its examples)."""
    ids: dict[str, list[int]] = {}
    for micro_batch in micro_batches:
        for kind, some in micro_batch.ids_by_kind().items():
            ids.setdefault(kind, []).extend(some)
    return ids


def last_losses(metrics: Path, count: int) -> list[float]:
    """The losses of the last `count` steps in metrics.jsonl that were not skipped."""
    if not metrics.exists():
        return []
    records = map(json.loads, from_the_end(metrics))
    losses = list(islice((record["loss"] for record in records if not record.get("skipped")), count))
    return losses[::-1]
