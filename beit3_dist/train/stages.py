"""Trains the stages of a run, one after the other in the same processes."""

from __future__ import annotations

import gc
import logging

import torch
import torch.distributed as dist

from beit3_dist.launched import read_place
from beit3_dist.leaving import leave_when_asked
from beit3_dist.looking import together
from beit3_dist.parallel.meeting import looks_of_all
from beit3_dist.run.endings import RunStopped
from beit3_dist.run.preflight_finetuning import FinetuneReady
from beit3_dist.run.stages import ReadyStages, opened
from beit3_dist.train.finetuning import finetune
from beit3_dist.train.pretraining import pretrain

log = logging.getLogger(__name__)


def train_stages(program: str, ready: ReadyStages) -> None:
    """Raises RunStopped where a stage cannot begin although it was checked, since files have changed meanwhile."""
    first = ready.first
    for stage in ready.stages:
        log.info("stage %s, in %s", stage.name, stage.config.out)
        try:
            with together(*looks_of_all(read_place())):
                prepared = first or opened(stage.config, ready.mesh_of(stage.config))
        except (ValueError, OSError) as error:
            raise RunStopped(f"stage {stage.name}: {error}") from error
        first = None
        finetune(prepared) if isinstance(prepared, FinetuneReady) else pretrain(prepared)
        del prepared
        _make_room()
        leave_when_asked(program)  # nothing is left to save


def _make_room() -> None:
    """Frees what a stage has held: engines are circles of references. Collective."""
    dist.barrier()
    gc.unfreeze()  # a run leaves them with what was imported
    gc.collect()
    gc.freeze()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
