"""A pipeline stage prepares a micro-batch when the schedule comes to it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from beit3_dist.parallel.pipeline import Stages


class Objective(nn.Module):
    """Stands for the model in the middle of a pipeline: passes on its input times the micro-batch's factor."""

    columns = 4
    model = SimpleNamespace(blocks=lambda x, layout, factor, layers, selection: x * factor)

    def with_drop_path(self, inputs: Any, sample_ids: Tensor, step: int) -> Any:
        return inputs


def test_micro_batches_are_prepared_one_by_one() -> None:
    """So that the last stage's tokenizer works while the former stages compute; two chunks share what is prepared."""
    prepared: list[int] = []

    def micro_batches(count: int) -> Iterator[tuple[Any, None, Tensor]]:
        for number in range(count):
            prepared.append(number)
            layout = SimpleNamespace(segments=(1, 1, 0, 0))
            yield SimpleNamespace(layout=layout, keep=10 + number), SimpleNamespace(selection=None), torch.zeros(2)  # type: ignore[misc]

    stages = Stages(Objective(), [range(1, 2), range(3, 4)], layers=6, tokens=3)
    x = torch.ones(3, 4)
    for _ in range(2):  # steps
        prepared.clear()
        stages.begin(micro_batches(4), torch.ones(4), step=0)
        assert prepared == []
        for number, chunk, expected in ((0, 0, [0]), (1, 0, [0, 1]), (0, 1, [0, 1]), (3, 0, [0, 1, 2, 3])):
            assert torch.equal(
                stages(x, number, chunk), (10.0 + number) * torch.tensor([[1.0], [1.0], [0.0]]).expand(3, 4)
            )
            assert prepared == expected
