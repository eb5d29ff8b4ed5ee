"""The order in which a run does things, as its parts see it."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.training import loop, tokenizer_loop
from beit3_dist.training.preemption import Preempted


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Notes the calls to all parts of a pretraining run of two steps, with a checkpoint after the second."""
    parts = MagicMock()
    for name in ("connect", "RunLock", "whole_checkpoint", "RunFolder", "Guards", "StepProfiler", "Checkpoints"):
        monkeypatch.setattr(loop, name, getattr(parts, name))
    for name in ("RunLock", "StepProfiler", "Checkpoints"):
        getattr(parts, name).return_value.__exit__.return_value = False
    parts.whole_checkpoint.return_value = (None, TrainState())
    parts.Guards().check.return_value = False
    parts.job.config = RunConfig(
        out="out",
        steps=2,
        data=DataConfig(images="a.tar", texts="b.tar", pairs="c.tar"),
        image_tokenizer="i",
        text_tokenizer="t",
        optim=OptimConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every=2),
    )
    parts.job.mesh = Mesh(0, 1, 0, 1, torch.device("cpu"))
    parts.job.samples = (1, 0, 0)
    parts.job.next_batch().replaced = 0
    parts.job.start().train_step().skipped = False
    parts.job.record.return_value = {"step": 1, "loss": 1.0}
    parts.job.evaluation_due.return_value = False
    parts.reset_mock()
    return parts


def calls_of(parts: Any) -> list[str]:
    return [name for name, _, _ in parts.mock_calls]


def last(calls: list[str], name: str) -> int:
    return len(calls) - 1 - calls[::-1].index(name)


def test_records_are_on_the_disk_before_the_checkpoint_that_goes_on_behind_them(parts: Any) -> None:
    loop.train(parts.job)
    calls = calls_of(parts)
    assert calls.count("Checkpoints().__enter__().save") == 1
    assert last(calls, "RunFolder().step") < calls.index("RunFolder().sync")
    assert calls.index("RunFolder().sync") < calls.index("Checkpoints().__enter__().save")


def test_so_they_are_where_the_image_tokenizer_is_trained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And codes that have become one are told once."""
    parts = MagicMock()
    names = "connect RunLock whole_checkpoint RunFolder TokenizerEngine loader BadSamples Checkpoints agreed"
    for name in [*names.split(), "record", "save_vqkd", "learning_rate"]:
        monkeypatch.setattr(tokenizer_loop, name, getattr(parts, name))
    parts.Checkpoints.return_value.__exit__.return_value = False
    parts.RunLock.return_value.__exit__.return_value = False
    parts.whole_checkpoint.return_value = (None, TrainState())
    parts.agreed.return_value = (0, 0, 0.0)
    parts.record.return_value = {}
    parts.TokenizerEngine().train_step().usage.perplexity = 1.01
    parts.loader.return_value = 2 * [(torch.zeros(1), torch.zeros(1), [])]
    config = MagicMock(steps=2, batch=1, pictures_every=0)
    config.checkpoint.every = 2
    config.optim.lr = 1e-3
    tokenizer_loop.train_tokenizer(config, Mesh(0, 1, 0, 1, torch.device("cpu")), MagicMock())
    calls = calls_of(parts)
    assert last(calls, "RunFolder().step") < calls.index("RunFolder().sync")
    assert calls.index("RunFolder().sync") < calls.index("Checkpoints().__enter__().save")
    (message,) = [message for message in caplog.messages if "collapsed" in message]
    assert message.startswith("step 1: the codes have collapsed")


def test_what_the_run_leaves_is_written_while_it_is_watched(parts: Any) -> None:
    """Where the first process fails with a full disk, the others learn of it by their guards alone."""
    loop.train(parts.job)
    calls = calls_of(parts)
    assert calls.index("Checkpoints().__exit__") < calls.index("job.finish") < calls.index("Guards().close")
    assert calls.index("Guards().close") < calls.index("RunLock().__exit__")


def test_a_run_that_was_asked_to_go_leaves_its_checkpoint_only(parts: Any) -> None:
    parts.Guards().check.return_value = True
    with pytest.raises(Preempted):
        loop.train(parts.job)
    assert "job.finish" not in calls_of(parts)
    assert calls_of(parts).count("Checkpoints().__enter__().save") == 1
