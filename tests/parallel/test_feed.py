"""What the ranks agree on about a step's samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from beit3_dist.data.batch import MicroBatch, Samples, mapped
from beit3_dist.data.faults import Fault
from beit3_dist.parallel.mesh import Groups
from beit3_dist.train import feed
from beit3_dist.train.feed import Feed, _broadcast
from tests.parallel.workers import run_workers

READING_S = [0.25, 9.0, 1.5, 9.0]
"""By rank; ranks 1 and 3 are tensor neighbours that get the samples from ranks 0 and 2."""


def batch_of_a_plugin() -> MicroBatch:
    """Without pairs; what is drawn has sizes that are no multiples of eight bytes, and nothing in one case."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8, generator=draw)
    drawn = {"image_mask": pixels[:, 0, 0] > 99, "score": torch.rand(3, generator=draw)}
    nothing = {"text": torch.zeros(2, 0, dtype=torch.int64)}
    text = torch.randint(0, 99, (2, 7), generator=draw)
    images = Samples(torch.arange(3), torch.arange(3), images=pixels, annotations={"a_plugin": drawn})
    texts = Samples(torch.arange(2), torch.arange(2), text=text, lengths=torch.tensor([7, 4]),
                    annotations={"a_plugin": nothing, "another": {}})  # fmt: skip
    return MicroBatch({"images": images, "texts": texts}, [Fault("texts", "a.tar", "key", "is empty")])


def received(groups: Groups) -> tuple[str, bool]:
    """The batch of the first tensor rank, as this one has it."""
    batch = _broadcast(groups, batch_of_a_plugin() if groups.mesh.tensor_rank == 0 else None)
    same = [torch.equal(ours, theirs) and ours.dtype == theirs.dtype
            for ours, theirs in zip(tensors_of(batch), tensors_of(batch_of_a_plugin()), strict=True)]  # fmt: skip
    return repr(mapped(batch, torch.Tensor, lambda _: None)), all(same) and len(same) == 11


def tensors_of(batch: MicroBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(batch, torch.Tensor, found.append)
    return found


def test_tensor_ranks_receive_any_structure() -> None:
    expected = repr(mapped(batch_of_a_plugin(), torch.Tensor, lambda _: None))
    assert run_workers(2, received, tensor=2) == [(expected, True)] * 2


def wait_of_a_step(groups: Groups) -> float:
    """The step's wait where each rank takes `READING_S` of a clock that stands still otherwise, though the first rank
    comes to the collective long after the others."""
    now = [1000.0 * (groups.mesh.rank == 0)]

    def read() -> list[MicroBatch]:
        now[0] += READING_S[groups.mesh.rank]
        return []

    # All that is needed where there are no samples.
    config: Any = SimpleNamespace(batch=SimpleNamespace(accumulation=0))
    objectives: Any = SimpleNamespace(losses=[], told=[], views=[])
    with patch.object(feed, "time", SimpleNamespace(perf_counter=lambda: now[0])):
        return Feed(config, objectives, groups).step(read).data_wait_s


@pytest.mark.parametrize(("tensor", "expected"), [(1, [9.0] * 4), (2, [1.5] * 4)])
def test_the_wait_of_a_step_is_that_of_its_slowest_reader(tensor: int, expected: list[float]) -> None:
    assert run_workers(4, wait_of_a_step, tensor=tensor) == expected
