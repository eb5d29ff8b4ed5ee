"""Steps that are skipped, since their loss or gradient is not finite: named, and too many in a row end the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import JobConfig
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.checkpointing import Checkpoints
from beit3_dist.run.endings import RunStopped
from beit3_dist.run.folder import RunFolder, of_all

log = logging.getLogger(__name__)


class HasIds(Protocol):
    """A micro-batch that knows its samples."""

    def ids_by_kind(self) -> Mapping[str, list[int]]:
        """Ids of the samples by the name of their stream."""


class SkippedSteps:
    """Writes skipped.jsonl, and says from which checkpoint it is good to go on."""

    def __init__(self, config: JobConfig, groups: Groups, run: RunFolder) -> None:
        self._groups, self._run, self._report = groups, run, Path(config.out) / "skipped.jsonl"
        self._most, self._last_step = config.guards.max_skipped_steps, config.steps

    def check(self, state: TrainState, micro_batches: Sequence[HasIds], checkpoints: Checkpoints) -> None:
        """After a step that was skipped. Raises RunStopped after too many in a row. Collective."""
        mesh, in_a_row, report = self._groups.mesh, state.skipped_in_a_row, self._report
        if mesh.tensor_rank == mesh.pipeline_rank == 0:  # others have the same samples
            self._run.skipped(state.step, of_all([sample_ids(micro_batches)], self._groups.data))
        log.warning("step %d was skipped: its loss or gradient is not finite; %s names its samples", state.step, report)
        if in_a_row < self._most and state.step < self._last_step:
            return
        good = checkpoints.last_good()
        last = (
            f"the last good checkpoint is {good}: go on from it by --checkpoint.resume {good}"
            if good
            else "there is no good checkpoint: start anew"
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
