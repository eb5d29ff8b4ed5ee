"""Values of a model that a checkpoint fills are not drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.objectives import together
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.run import preflight
from beit3_dist.run import preflight_finetuning as finetune_preflight
from beit3_dist.tasks.config import FinetuneConfig, TaskDataConfig
from beit3_dist.tasks.parts import heads
from beit3_dist.tasks.registry import task_class
from tests.parallel.training import run_config

SHAPE = torch.Size([3, 2])


def not_to_be_called(*_: Any) -> None:
    pytest.fail("a value was drawn")


def test_only_a_new_run_draws_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the checkpoint fills every element: tests/integration/test_resume.py, bit by bit."""
    pretraining = run_config("paper", zero_stage=3, accumulation=1, data_parallel=1)
    task = TaskDataConfig(train="unused", images="unused", text_length=20)
    tuning = FinetuneConfig(task="nlvr2", out="unused", text_tokenizer="unused", model=pretraining.model, data=task)

    def values(checkpoint: Path | None) -> list[torch.Tensor]:
        of_pretraining = preflight._values(pretraining, checkpoint, objectives_of(pretraining), before=None)
        of_tuning = finetune_preflight._values(tuning, task_class("nlvr2")(tuning, None), checkpoint, None)
        return [of("blocks.0.ffn.vision.fc1.weight", SHAPE) for of in (of_pretraining, of_tuning)]

    assert all(value.any() for value in values(None))
    monkeypatch.setattr(together, "initial_value", not_to_be_called)
    monkeypatch.setattr(heads, "initial_value", not_to_be_called)
    assert all(value.shape == SHAPE and not value.any() for value in values(Path("checkpoint")))
