"""On how many nodes a run can go on: those by whose processes its batch divides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from beit3_dist.config import STREAMS, JobConfig, RunConfig, TrainingConfig, is_auto, require
from beit3_dist.image_tokenizer.config import TokenizerConfig

RANKS = (1, 2, 4, 8)
"""Tensor and pipeline ranks that auto tries."""


def dividing_nodes(configs: Sequence[JobConfig], nodes: int, least: int, processes: int) -> int:
    """The most of `nodes` nodes of `processes` processes each on which all runs can be, one after the other.

    Args:
        least: at this number the search ends; with `nodes` there is none, and the run itself says what does not divide.
    Raises:
        ValueError: there is no such number.
    """
    require(0 < least <= nodes, f"BEIT3_LEAST_NODES={least} of the {nodes} nodes of this job: give at most as many")
    if least == nodes:
        return nodes
    for number in range(nodes, least - 1, -1):
        if all(_divides(config, number * processes) for config in configs):
            return number
    raise ValueError(
        f"by {processes} processes on each of {least} to {nodes} nodes no batch of this run divides: change "
        "BEIT3_LEAST_NODES or the batch, or leave parallel.tensor, parallel.pipeline and batch.accumulation to auto"
    )


def _divides(config: JobConfig, world: int) -> bool:
    if isinstance(config, TokenizerConfig):
        return config.batch % world == 0
    assert isinstance(config, TrainingConfig)
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    for ranks in product(_tried(tensor), _tried(pipeline)):
        replicas, left = divmod(world, ranks[0] * ranks[1])
        if left == 0 and any(_fits(config, replicas, a) for a in _accumulations(config, ranks[1])):
            return True
    return False


def _tried(value: int) -> Sequence[int]:
    return RANKS if is_auto(value) else (value,)


def _accumulations(config: TrainingConfig, pipeline: int) -> Iterator[int]:
    """A pipeline needs a micro-batch a stage."""
    if not is_auto(config.accumulation):
        yield config.accumulation
        return
    assert isinstance(config, RunConfig)  # the only one that may leave it open
    yield from accumulations(config, pipeline)


def accumulations(config: RunConfig, fewest: int = 1) -> list[int]:
    """Numbers of micro-batches that auto tries."""
    most = max(getattr(config.batch, name) for name in STREAMS)
    return [n for n in (2**power for power in range(most.bit_length())) if fewest <= n <= most]


def _fits(config: TrainingConfig, replicas: int, accumulation: int) -> bool:
    if isinstance(config, RunConfig):
        config = replace(config, batch=replace(config.batch, accumulation=accumulation))
    try:
        config.micro_batch(replicas)
    except ValueError:
        return False
    return True
