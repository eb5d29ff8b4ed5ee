"""A loader's state is what was handed out, not what was read ahead."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MicroBatch, MixedBatches
from beit3_dist.data.stateful import StatefulLoader
from tests.unit.tar_fixtures import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_run(tmp_path_factory.mktemp("run"))


def opened(run: RunConfig, accumulation: int, rank: int = 0, world: int = 1, workers: int = 0) -> StatefulLoader:
    batch = replace(run.batch, accumulation=accumulation)
    return StatefulLoader(MixedBatches(replace(run, batch=batch), 32, rank, world), workers, 2, pin=False)


def ids(batches: list[MicroBatch]) -> list[list[int]]:
    return [[samples.ids.tolist() for samples in batch.streams.values()] for batch in batches]


def test_goes_on_after_what_was_handed_out(run: RunConfig) -> None:
    whole = ids(list(itertools.islice(opened(run, 2), 9)))
    for taken, workers in ((0, 0), (3, 2), (4, 0)):
        first = opened(run, 2, workers=workers)
        batches = iter(first)
        assert ids([next(batches) for _ in range(taken)]) == whole[:taken]
        state = json.loads(json.dumps(first.state_dict()))
        assert state["micro"] == taken % 2 and state["images"] == taken // 2 * 8
        second = opened(run, 2, workers=1 if taken == 3 else 0)
        second.load_state_dict(state)
        assert ids(list(itertools.islice(second, 9 - taken))) == whole[taken:]


def test_other_layouts_go_on_between_steps_only(run: RunConfig) -> None:
    first = opened(run, 1)
    batches = iter(first)
    next(batches)
    expected = next(batches)
    halves = [opened(run, 1, rank, 2) for rank in range(2)]
    before = opened(run, 1)
    next(iter(before))
    for half in halves:
        half.load_state_dict(before.state_dict())
    found = [next(iter(half)) for half in halves]
    for name, samples in expected.streams.items():
        assert samples.ids.dtype == found[0].streams[name].ids.dtype
    images = [torch.cat([batch.streams["images"].images for batch in part]) for part in (found, [expected])]
    assert torch.equal(*images)

    inside = opened(run, 2)
    next(iter(inside))
    with pytest.raises(ValueError, match="inside a step of 1 data-parallel ranks and batch.accumulation=2"):
        opened(run, 4).load_state_dict(inside.state_dict())
    opened(run, 2).load_state_dict(inside.state_dict())
