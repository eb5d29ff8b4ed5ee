"""The order in which a run does things, as its parts see it."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig
from beit3_dist.data.faults import Fault
from beit3_dist.image_tokenizer.engine import TokenizerStep
from beit3_dist.image_tokenizer.quantizer import CodeUsage
from beit3_dist.parallel.engine import StepResult
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run import checkpointing
from beit3_dist.run.endings import AskedToGo, Preempted, RunStopped
from beit3_dist.train import loop
from beit3_dist.train.finetuning import FineTuning
from beit3_dist.train.image_tokenizer import TokenizerTraining


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Notes the calls to all parts of a pretraining run of two steps, with a checkpoint after the second."""
    parts = MagicMock()
    for name in ("connect", "RunLock", "whole_checkpoint", "RunFolder", "Guards"):
        monkeypatch.setattr(loop, name, getattr(parts, name))
    monkeypatch.setattr(checkpointing, "Store", parts.Store)
    parts.RunLock.return_value.__exit__.return_value = False
    parts.whole_checkpoint.return_value = (None, TrainState())
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
    parts.job.samples = {"images": 1}
    parts.job.next_batch().known.replaced = 0
    parts.job.train_step().skipped = False
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
    assert calls.count("Store().save") == 1
    assert last(calls, "RunFolder().step") < calls.index("RunFolder().sync")
    assert calls.index("RunFolder().sync") < calls.index("Store().save")


def test_what_the_run_is_used_by_is_written_before_a_checkpoint_that_nobody_may_go_on_from(parts: Any) -> None:
    loop.train(parts.job)
    calls = calls_of(parts)
    assert calls.count("job.export") == 1 and calls.index("job.export") < calls.index("Store().save")


def test_codes_that_have_become_one_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    config, batch, mesh = MagicMock(), MagicMock(**{"known.tokens": 1}), Mesh(0, 1, 0, 1, torch.device("cpu"))
    config.optim.lr = 1e-3
    job = TokenizerTraining(MagicMock(config=config, mesh=mesh, state=TrainState(step=1)))
    for perplexity in (3.0, 1.01, 1.01):
        usage = CodeUsage(0.1, perplexity)
        job.record(batch, TokenizerStep(1.0, 1.0, 0.0, 1.0, usage, torch.zeros(1)), lr=1e-3, step_s=1.0)
        job.state.step += 1
    (message,) = [message for message in caplog.messages if "collapsed" in message]
    assert message.startswith("step 2: the codes have collapsed")


def test_what_the_run_leaves_is_written_while_it_is_watched(parts: Any) -> None:
    """Where the first process fails with a full disk, the others learn of it by their guards alone."""
    loop.train(parts.job)
    calls = calls_of(parts)
    assert last(calls, "Store().wait") < calls.index("job.finish") < calls.index("Guards().close")
    assert calls.index("Guards().close") < calls.index("RunLock().__exit__")


def test_a_run_that_was_asked_to_go_leaves_its_checkpoint_only(parts: Any) -> None:
    parts.job.next_batch.side_effect = [parts.job.next_batch(), AskedToGo]
    with pytest.raises(Preempted, match="saved after step 1 of 2"):
        loop.train(parts.job)
    assert "job.finish" not in calls_of(parts)
    calls = calls_of(parts)
    assert calls.count("Store().save") == 1
    assert calls.index("RunFolder().sync") < calls.index("Store().save")


def test_where_nothing_is_new_nothing_is_saved(parts: Any) -> None:
    parts.job.next_batch.side_effect = AskedToGo
    with pytest.raises(Preempted, match="after step 0"):
        loop.train(parts.job)
    assert "Store().save" not in calls_of(parts)


def test_a_moving_average_leaves_skipped_steps_out() -> None:
    """Where the step is not finite, it has changed nothing."""
    job = FineTuning.__new__(FineTuning)
    job.task, job._engine, job._average = MagicMock(), MagicMock(), MagicMock()
    for norm in (math.nan, 1.0):
        job._engine.train_step.return_value = StepResult([1.0], [1.0], norm)
        job.train_step(MagicMock(), 0, 1e-3)
        assert job._average.update.called == math.isfinite(norm)


def test_the_samples_that_end_a_run_are_written_down(parts: Any) -> None:
    bad = [Fault("images", "a.tar", "key", "undecodable image")]
    parts.job.next_batch.side_effect = RunStopped("100 bad samples in a row", bad)
    with pytest.raises(RunStopped):
        loop.train(parts.job)
    parts.RunFolder().quarantine.assert_called_with(1, bad)
