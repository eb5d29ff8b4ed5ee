"""The passes over the model that a step takes, as the engine is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import Codes
from beit3_dist.objectives.base import SecondPass
from beit3_dist.objectives.together import Objectives
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.train.averages import WeightAverage
from beit3_dist.train.feed import StepBatch, prepared
from beit3_dist.train.flops import pretraining_flops


def _to_look_at(objectives: Objectives, batches: list[MicroBatch], mesh: Mesh) -> Iterator[tuple[Any, ...]]:
    """Micro-batches as `Engine.look` takes them, for these objectives, which ask nobody about codes."""

    def no_codes(images: Tensor) -> Tensor:
        return images.new_zeros(len(images), objectives.model.patches, dtype=torch.int64)

    for batch in batches:
        inputs, reading, ids = prepared(objectives, batch, mesh, no_codes)
        yield inputs, replace(reading, objectives=objectives), ids


def passes(
    objectives: Objectives,
    engine: Engine,
    batch: StepBatch,
    codes_of: Callable[[MicroBatch], Codes | None],
    average: WeightAverage | None,
    step: int = 0,
) -> Iterator[tuple[Any, ...]]:
    """The micro-batches of a step as this process's part of the model takes them, each prepared when it is asked for;
    before the first one, objectives that look ahead have seen all of them, and those that look back, too, by the
    `average` of the weights. What second passes cost is added to the step's totals, once it is known. Collective."""
    mesh, batches = engine.mesh, batch.micro_batches
    seconds: list[SecondPass] = []
    looked: list[dict[str, Any]] = [{} for _ in batches]
    if (back := objectives.back) is not None:
        assert average is not None
        with average.applied():
            found = engine.look(_to_look_at(back, batches, mesh), step, drops=False)
        looked = [own | more for own, more in zip(looked, back.looked(found, step), strict=True)]
    if (ahead := objectives.ahead) is not None:
        found = engine.look(_to_look_at(ahead, batches, mesh), step)
        looked = [own | more for own, more in zip(looked, ahead.looked(found, step), strict=True)]
    for number, (micro_batch, own) in enumerate(zip(batches, looked, strict=True)):
        inputs, reading, ids = prepared(objectives, micro_batch, mesh, codes_of(micro_batch))
        if own:
            reading = objectives.with_looked(reading, own)
        if objectives.second_pass:
            reading = objectives.with_second(reading, batches, number, step, seconds.append)
        yield inputs, reading, ids
    if objectives.second_pass:
        captions = torch.cat([second.captions for second in seconds])
        tokens = len(captions) * (1 + objectives.model.patches) + int(captions.sum())
        a, b, c, d = torch.tensor([second.selection.counts for second in seconds]).sum(0).tolist()
        nothing = [0] * len(objectives.told)
        flops = pretraining_flops(objectives, 0, captions, captions[:0], (a, b, c, d), nothing)
        batch.add(engine.groups, tokens, flops)


def passes_by_stream(
    by_stream: Mapping[str, Objectives],
    engine: Engine,
    batch: StepBatch,
    codes_of: Callable[[MicroBatch], Codes | None],
    begins: Callable[[str], None],
) -> Iterator[tuple[Any, ...]]:
    """As `passes`, each micro-batch stream by stream, with the objectives of each; `begins` is told which is next."""
    for micro_batch in batch.micro_batches:
        for stream, objectives in by_stream.items():
            alone = MicroBatch({stream: micro_batch.streams[stream]})
            inputs, reading, ids = prepared(objectives, alone, engine.mesh, codes_of(alone))
            begins(stream)
            yield inputs, replace(reading, objectives=objectives), ids
