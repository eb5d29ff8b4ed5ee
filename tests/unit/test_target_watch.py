"""Targets that are all but one are told once, whatever the loss looks like; others are not."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.model.token_layout import Selection
from beit3_dist.objectives.base import Loss
from beit3_dist.objectives.masked_data_modeling import Targets
from beit3_dist.objectives.together import Reading
from beit3_dist.parallel.mesh import Groups, Mesh
from beit3_dist.tools.benchmarks.step import objectives_for
from beit3_dist.train.target_watch import ENOUGH, TargetWatch, collapse, entropy
from tests.parallel.workers import run_workers
from tests.unit.small_checkpoints import one_process as one_process

MODEL = ModelConfig(layers=1, width=8, heads=2, ffn_width=8, vocab_size=30, visual_vocab_size=20, vl_expert_layers=0)
MANY = 60
STREAMS = ("image", "text", "pair_image", "pair_text")


def targets(image: Tensor, text: Tensor, pair_image: Tensor, pair_text: Tensor) -> Reading:
    """With these codes and words."""
    counts = [len(image), len(pair_image)], [len(pair_text), len(text)]
    found = Targets(torch.cat([image, pair_image]), torch.cat([pair_text, text]), *counts)
    return Reading(Selection(torch.zeros(0, dtype=torch.int64), (0, 0, 0, 0)), [None], [found])


def drawn(stream: str, number: int = MANY) -> Tensor:
    """Targets that differ, other ones in each stream."""
    return (torch.arange(number) * 7 + STREAMS.index(stream)) % 19


def with_one(stream: str, value: int, number: int = MANY) -> Reading:
    """Targets of which one stream's are all alike."""
    return targets(*(torch.full((number,), value) if name == stream else drawn(name, number) for name in STREAMS))


@pytest.fixture
def watch(one_process: None) -> TargetWatch:
    return TargetWatch(objectives_for(MODEL), Mesh(0, 1, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize("stream", STREAMS)
def test_one_target_is_told_once_and_by_name(stream: str, watch: TargetWatch, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        watch.add(with_one(stream, 11))
        found = watch.measure()
        assert found[f"entropy_{stream}"] == 0
        assert all(found[f"entropy_{other}"] > 2.5 for other in STREAMS if other != stream)
    (message,) = caplog.messages
    titles = {"image": "images", "text": "texts", "pair_image": "images of pairs", "pair_text": "captions of pairs"}
    kind, field = ("code", "image_tokenizer") if "image" in stream else ("word", "text_tokenizer")
    assert message.startswith(f"the targets of {titles[stream]} have collapsed: 100.0% of {MANY} ")
    assert f"are the {kind} 11" in message and field in message


def test_what_differs_is_not_told(watch: TargetWatch, caplog: pytest.LogCaptureFixture) -> None:
    """Also two targets of which one is rare: 5 of 60."""
    rare = torch.where(torch.arange(MANY) < 5, 3, 4)
    for _ in range(20):
        watch.add(targets(rare, rare, rare, rare))
        assert watch.measure()["entropy_image"] == pytest.approx(-(math.log(5 / 60) * 5 + math.log(55 / 60) * 55) / 60)
    assert not caplog.messages


def test_a_few_alike_say_nothing_until_they_are_many(watch: TargetWatch, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(1, 6):
        watch.add(with_one("image", 2, number=ENOUGH // 5))
        watch.measure()
        assert bool(caplog.messages) == (step == 5)


def test_a_collapse_in_mid_run_is_told(watch: TargetWatch, caplog: pytest.LogCaptureFixture) -> None:
    """What came before does not hide it."""
    for _ in range(50):
        watch.add(targets(*map(drawn, STREAMS)))
        watch.measure()
    assert not caplog.messages
    watch.add(with_one("text", 3))
    watch.measure()
    assert len(caplog.messages) == 1


def test_micro_batches_of_a_step_are_counted_together_and_steps_apart(watch: TargetWatch) -> None:
    for value in (3, 4):
        watch.add(with_one("image", value))
    assert watch.measure()["entropy_image"] == pytest.approx(math.log(2))
    watch.add(with_one("image", 4))
    assert watch.measure()["entropy_image"] == 0


def test_nothing_counted_is_no_collapse() -> None:
    assert (
        entropy(torch.zeros(5, dtype=torch.int64)) == 0
        and collapse(Loss("image", 1.0), torch.zeros(5, dtype=torch.int64)) == ""
    )


def test_steps_that_are_measured() -> None:
    assert [step for step in range(1, 402) if TargetWatch.is_due(step)] == [*range(1, 11), 100, 200, 300, 400]


def measured(groups: Groups, tensor: int) -> tuple[dict[str, float], list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("beit3_dist").addHandler(handler)
    watch = TargetWatch(objectives_for(MODEL), groups.mesh)
    watch.add(with_one("image", groups.mesh.data_rank + 3))
    return watch.measure(), messages


def test_ranks_are_counted_together() -> None:
    """Each of two has one code, but another one; the first process alone would say."""
    (found, messages), (others, none) = run_workers(2, measured, 1)
    assert found == others and found["entropy_image"] == pytest.approx(math.log(2)) and not messages and not none
