"""What a run watches itself for while it trains: bad samples, skipped steps, loss spikes, unequal copies of
weights, slow ranks, steps that hang, a signal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import JobConfig
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.checkpointing import Checkpoints
from beit3_dist.run.folder import RunFolder
from beit3_dist.run.guards.bad_samples import BadSamples
from beit3_dist.run.guards.copies import EqualCopies, Held
from beit3_dist.run.guards.skipped_steps import HasIds, SkippedSteps
from beit3_dist.run.guards.speeds import Speeds
from beit3_dist.run.guards.spikes import SpikeMonitor, last_losses
from beit3_dist.run.guards.watchdog import Watchdog
from beit3_dist.run.preemption import StopRequest

log = logging.getLogger(__name__)


class Guards:
    """Every process has this, from before its model is built until its last step."""

    def __init__(
        self, config: JobConfig, groups: Groups, run: RunFolder, state: TrainState, max_bad_fraction: float | None
    ) -> None:
        """`state`: where the run goes on. `max_bad_fraction`: see `Job`."""
        settings, out, mesh = config.guards, Path(config.out), groups.mesh
        self._watchdog, self._request = Watchdog(settings.step_timeout_s, mesh, run.log_file), StopRequest(mesh.device)
        self.begin, self.together = self._watchdog.begin, self._request.together
        self._skipped_steps = SkippedSteps(config, groups, run)
        self._bad_samples = BadSamples(max_bad_fraction, out, mesh, state) if max_bad_fraction is not None else None
        self._copies = EqualCopies(settings.compare_every, groups, out, state.step)
        self.check_speeds = Speeds(settings.times_every, mesh, run).check
        self._spikes = None
        if mesh.is_first and settings.spike_factor:
            losses = last_losses(out / "metrics.jsonl", settings.spike_window)
            self._spikes = SpikeMonitor(settings.spike_window, settings.spike_factor, losses)

    def check_step(
        self, state: TrainState, micro_batches: Sequence[HasIds], loss: float, checkpoints: Checkpoints
    ) -> None:
        """After a step, its record written. Raises RunStopped, on all ranks, after too many skipped steps in a row."""
        if state.skipped_in_a_row:
            self._skipped_steps.check(state, micro_batches, checkpoints)
        elif self._spikes and (warning := self._spikes.check(state.step, loss)):
            log.warning(warning)

    def check_copies(self, state: TrainState, held: Callable[[], Iterable[Held]]) -> None:
        """After a step. Raises RunStopped, on all ranks, where copies of weights are no longer equal."""
        if self._copies.is_due(state.step):
            self._copies.check(state, held())

    def check_samples(self, state: TrainState) -> None:
        """After a step, its checkpoint begun. Raises RunStopped, on all ranks, after too many bad samples."""
        if self._bad_samples:
            self._bad_samples.check(state)

    def close(self) -> None:
        self._watchdog.close()
        self._request.close()
