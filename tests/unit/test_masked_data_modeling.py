"""The four losses are weighed and divided as written, without waiting for the device."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_dist.config import ModelConfig
from beit3_dist.model.token_layout import Selection
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling, Targets
from beit3_dist.objectives.together import PretrainingModule, Reading
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes, random_micro_batch
from tools.benchmarks.step import objectives_for


class Operations(TorchDispatchMode):
    """Notes the operations that bring numbers of the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if any(name in str(function) for name in ("lift_fresh", "_to_copy", "copy_")):
            self.copies.append(str(function))
        return function(*arguments, **(options or {}))


def test_weights_are_numbers_not_tensors() -> None:
    names = ("image_weight", "text_weight", "pair_image_weight", "pair_text_weight")
    weights = (1.0, 0.3, 2.5, 0.7)
    objectives = objectives_for(ModelConfig(), **dict(zip(names, weights, strict=True)))
    objective = PretrainingModule(torch.nn.Identity(), objectives, seed=0)  # type: ignore[arg-type]
    losses = torch.rand(2, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses_of: Any = objective.model
    losses_of.image_losses = lambda patches, codes: losses[:, :8]
    losses_of.text_losses = lambda words, ids: losses[:, 8:]
    rows = torch.arange(20)
    reading = Reading(Selection(rows, (5, 3, 5, 7)), [None], [Targets(rows[:8], rows[8:], [5, 3], [5, 7])])
    step_counts = torch.tensor([11, 13, 0, 17])
    with Operations() as operations:
        contribution, statistics = objective.losses(torch.zeros(20, 4), reading, step_counts)
        contribution.backward()
    assert operations.copies == []
    sums = [part.sum(1) for part in losses.detach().split([5, 3, 5, 7], dim=1)]
    expected = torch.stack([sums[0], sums[3], sums[1], sums[2]], dim=1)
    assert torch.equal(statistics, expected)
    assert torch.equal(
        contribution, (torch.tensor(weights) * expected[0] / step_counts.clamp(min=1)).sum()
    )  # bit for bit


def test_what_the_host_knows_of_a_micro_batch_is_made_once_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's totals and the inputs take the same rows."""
    asked, rows = [], MaskedDataModeling.rows
    monkeypatch.setattr(MaskedDataModeling, "rows", lambda *given: asked.append(1) or rows(*given))
    config = ModelConfig(layers=3, width=8, heads=2, ffn_width=8, patch_size=4, image_size=16)
    objectives, batch = objectives_for(config), random_micro_batch(config)
    host_totals([batch], objectives)
    _, reading, _ = objectives.prepare(batch, torch.device("cpu"), precomputed_codes(config))
    assert len(asked) == 1 and reading is not None and len(reading.selection.rows) == sum(objectives.counts(batch))
    another = random_micro_batch(config, seed=1)
    assert objectives.on_host(another) is not objectives.on_host(batch)
    gone = weakref.ref(batch)
    del batch
    assert gone() is None
