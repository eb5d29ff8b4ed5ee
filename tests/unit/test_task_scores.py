"""Scores of tasks count the examples that have a truth: indexes for test servers lack some or all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_dist.tasks.captioning import Captioning
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.vqa import VQA

WORDS = ["a", "red", "blue", "cat"]
TOKENIZER: Any = SimpleNamespace(decode=lambda row: " ".join(WORDS[word] for word in row))
CONFIG: Any = SimpleNamespace(eval=SimpleNamespace(caption_metrics=["exact_match"]))
CAPTIONS = torch.tensor([[0, 1, 3], [0, 2, 3], [0, 1, 3]])
ANSWERS = torch.tensor([1, 0, 1, 1])


def picture(number: int, words: tuple[int, ...] | None, *references: str) -> Example:
    return Example(number, (), words, number, str(number), references)


def question(number: int, label: dict[int, float], *people: str) -> Example:
    return Example(number, (), (5,), label, str(number), people)


def test_captions_are_scored_where_there_are_references() -> None:
    task = Captioning(CONFIG, TOKENIZER)
    some = [picture(0, None, "a red cat"), picture(1, None), picture(2, (0, 2, 3))]
    assert task.score(CAPTIONS, some) == {"exact_match": 0.5}  # the first is right, the third is a blue cat
    assert task.score(CAPTIONS, [picture(number, None) for number in range(3)]) == {}


def test_answers_are_scored_where_somebody_has_answered() -> None:
    task = VQA(CONFIG, TOKENIZER, ["no", "yes"])
    unasked = question(9, {})
    right, wrong = question(0, {}, *["yes"] * 10), question(1, {1: 1.0})
    other_words = question(2, {}, "perhaps")  # a truth that the model has no answer for
    assert task.score(ANSWERS, [right, wrong, unasked, unasked]) == {"vqa_accuracy": pytest.approx(0.5)}
    assert task.score(ANSWERS, [right, wrong, other_words, unasked]) == {"vqa_accuracy": pytest.approx(1 / 3)}
    assert task.score(ANSWERS, [unasked] * 4) == {}
