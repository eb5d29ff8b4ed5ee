"""The passes over the model that a step takes, as the engine is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import Tokenize
from beit3_dist.objectives.together import Objectives
from beit3_dist.parallel.engine import Engine
from beit3_dist.train.feed import prepared


def passes(
    objectives: Objectives,
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    tokenize_of: Callable[[MicroBatch], Tokenize | None],
    step: int = 0,
) -> Iterator[tuple[Any, ...]]:
    """The micro-batches of a step as this process's part of the model takes them, each prepared when it is asked for;
    before the first one, objectives that look ahead have seen all of them. Collective."""
    ahead, mesh = objectives.ahead, engine.mesh
    looked: list[Any] = [None] * len(micro_batches)
    if ahead is not None:
        looked = ahead.looked(engine.look((prepared(ahead, b, mesh, None) for b in micro_batches), step))
    for micro_batch, own in zip(micro_batches, looked, strict=True):
        inputs, reading, ids = prepared(objectives, micro_batch, mesh, tokenize_of(micro_batch))
        yield inputs, reading if own is None else objectives.with_looked(reading, own), ids
