"""Answers that are written: what is learnt of which words, and how they are scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_dist.model import BEiT3
from beit3_dist.tasks.base import TaskInputs, told_places
from beit3_dist.tasks.config import FinetuneConfig, TaskDataConfig
from beit3_dist.tasks.data.batches import padded_words
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.open_vqa import Answered, OpenVQA, joined_words
from tests.unit.test_decoding import WRITING, answered, model_of

BOS, PAD, EOS = 0, 1, 2
NAMES = ["no", "yes", "a cat"]
TOKENIZER: Any = SimpleNamespace(bos=BOS, pad=PAD, eos=EOS, decode=lambda row: NAMES[row[0]])
QUESTIONS, ANSWERS = [[5, 6, 7], [8], [9, 10]], [[20], [21, 22, 23], [24, 25]]


def task(**settings: Any) -> OpenVQA:
    return OpenVQA(SimpleNamespace(drop_worst_ratio=0.0, label_smoothing=0.0, **settings), TOKENIZER, NAMES)  # type: ignore[arg-type]


def batch(architecture: str) -> tuple[Any, TaskInputs, Tensor]:
    """A model, what it learns from and the images."""
    model = model_of(architecture)
    words, padding = padded_words([joined_words(q, a, 12) for q, a in zip(QUESTIONS, ANSWERS, strict=True)], 12)
    asked = task(model=model.config)
    shown, targets = asked.mask(words, padding, [0, 1, 2])
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert targets is not None
    told = told_places(targets)
    inputs = TaskInputs(images[:, None], shown, padding, torch.zeros(3), torch.arange(3), targets, told)
    return model, inputs, asked.losses(model, inputs)


@pytest.mark.parametrize("architecture", ["paper", "released", "with a decoder"])
def test_the_words_of_answers_are_learnt_one_after_the_other(architecture: str) -> None:
    """Each at the one before it, </s> included, by what a decoder that writes would say there."""
    model, inputs, losses = batch(architecture)
    expected = [plain_losses(model, inputs.images[n], QUESTIONS[n], ANSWERS[n]) for n in range(3)]
    torch.testing.assert_close(losses[0], torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert losses.shape == (2, 2 + 4 + 3)
    assert (model.config == WRITING) == (architecture == "with a decoder")


def plain_losses(model: BEiT3, image: Tensor, question: list[int], answer: list[int]) -> Tensor:
    asked, words, found = torch.tensor([[BOS, *question, EOS]]), [BOS, *answer, EOS], []
    for number in range(1, len(words)):
        logits = answered(model, image, asked, torch.tensor([words[:number]]))
        found.append(-logits.log_softmax(-1)[words[number]])
    return torch.stack(found)


def test_a_question_makes_room_for_its_answer() -> None:
    assert joined_words([5, 6, 7], [20, 21], 9) == (5, 6, 7, EOS, BOS, 20, 21)
    assert joined_words([5, 6, 7], [20, 21], 8) == (5, 6, EOS, BOS, 20, 21)
    answers = Answered([Example(0, (), (5,), {0: 0.3, 2: 0.9}, "0")], [[20], [21], [22, 23]], 12)
    assert answers[0].words == (5, EOS, BOS, 22, 23)


def test_written_answers_are_scored_in_the_benchmarks_form() -> None:
    def example(label: dict[int, float], *people: str) -> Example:
        return Example(0, (), (5,), label, "0", people)

    written = torch.tensor([[2], [1], [1], [1]])
    ten = ["Cat"] * 2 + ["dog"] * 8
    examples = [example({}, *ten), example({1: 0.6, 0: 1.0}), example({1: 1.0}), example({})]
    right = [0.6, 0.6, 1.0]  # of "a cat": what two of ten said, one of nine or two of the others; no label has the last
    assert task().score(written, examples) == {
        "vqa_accuracy": pytest.approx(sum(right) / 3), "exact_match": pytest.approx(1 / 3)
    }  # fmt: skip
    assert task().score(written[:1], [example({})]) == {}


def test_texts_leave_room_for_what_is_written() -> None:
    settings: dict[str, Any] = {"task": "open_vqa", "out": "o", "text_tokenizer": "t"}
    data = TaskDataConfig(train="a", answers="b", text_length=12)
    model = model_of("paper").config
    with pytest.raises(ValueError, match="text_length=12 leaves no room in model.max_text_length=12 for an answer of"):
        FinetuneConfig(**settings, model=model, data=data)
