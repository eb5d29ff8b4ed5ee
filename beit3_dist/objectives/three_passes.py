"""What the one pass over a mixed micro-batch is compared with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from beit3_dist.config import STREAMS
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import Tokenize
from beit3_dist.model.beit3 import MixedInputs
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule, Reading

Pass = tuple[PretrainingModule, list[int], MixedInputs, Reading | None, Tensor]


def prepare_passes(
    module: PretrainingModule, batch: MicroBatch, device: torch.device, tokenize: Tokenize
) -> list[Pass]:
    """The micro-batch of each stream by itself, under objectives that know no other stream, with the places of their
    losses among all."""
    run, passes = module.objectives.run, []
    names = [loss.name for loss in module.objectives.told]
    for stream, samples in batch.streams.items():
        sizes = {name: getattr(run.batch, name) if name == stream else 0 for name in STREAMS}
        alone = PretrainingModule(
            module.model, objectives_of(replace(run, batch=replace(run.batch, **sizes))), module.seed
        )
        columns = [names.index(loss.name) for loss in alone.objectives.told]
        prepared = alone.objectives.prepare(MicroBatch({stream: samples}), device, tokenize)
        passes.append((alone.train(module.training), columns, *prepared))
    return passes


def three_passes(passes: list[Pass], step_counts: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The step as plain forward passes, one per stream: the reference that tests and benchmarks compare the one pass
    with. The same results as `PretrainingModule.forward`."""
    statistics = torch.zeros(2, len(step_counts), device=step_counts.device)
    total = torch.zeros((), device=step_counts.device)
    for module, columns, inputs, reading, ids in passes:
        contribution, found = module(inputs, reading, ids, step_counts[columns], step)
        total = total + contribution
        statistics[:, columns] = found
    return total, statistics
