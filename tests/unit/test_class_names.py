"""Pictures are told by the names of their classes: the loss where a batch has a class twice, and the best names."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_dist.config import ModelConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.objectives.contrast import Vectors, softmax_contrast
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.imagenet_retrieval import ImageNetRetrieval
from tests.unit.tar_fixtures import train_tokenizer

MODEL = ModelConfig(layers=2, width=32, heads=2, ffn_width=48, patch_size=8, image_size=16, vocab_size=310,
                    visual_vocab_size=8, vl_expert_layers=1, max_text_length=16)  # fmt: skip
NAMES = ["a red circle", "cat", "two dogs of the same colour", "blue", "a small house"]


def vectors(count: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_all_pictures_of_a_class_are_right_for_its_name() -> None:
    """By hand: the mean over the right ones of -log of their shares, both ways."""
    labels = [3, 1, 3, 0]
    images, texts, scale = vectors(4, 0), vectors(4, 1), torch.tensor([5.0])
    texts[2] = texts[0]  # the same name
    losses, hits = softmax_contrast(Vectors(images, texts, scale, labels=torch.tensor(labels)[:, None]))
    for row, label in enumerate(labels):
        right = [other for other in range(4) if labels[other] == label]
        loss, found = 0.0, 0.0
        for mine, theirs in ((images, texts), (texts, images)):
            logits = (5 * theirs @ mine[row]).tolist()
            everything = math.log(sum(map(math.exp, logits)))
            loss += sum(everything - logits[other] for other in right) / len(right) / 2
            found += (logits.index(max(logits)) in right) / 2
        assert losses[row].item() == pytest.approx(loss, rel=1e-5)
        assert hits[row].item() == found


def test_smoothing_spreads_a_share_over_all_candidates() -> None:
    """By hand: nine tenths of the loss without it, and a tenth of the mean over all of -log of their shares."""
    images, texts, scale = vectors(4, 0), vectors(4, 1), torch.tensor([5.0])
    for labels in (None, torch.tensor([[3], [1], [3], [0]])):
        plain, smooth = (
            softmax_contrast(Vectors(images, texts, scale, labels=labels), smoothing=s) for s in (0.0, 0.1)
        )
        scores = 5 * images @ texts.T
        everywhere = -(scores.log_softmax(1).mean(1) + scores.T.log_softmax(1).mean(1)) / 2
        torch.testing.assert_close(smooth[0], 0.9 * plain[0] + 0.1 * everywhere)
        assert torch.equal(smooth[1], plain[1])


def test_without_a_class_twice_it_is_the_contrast_of_retrieval() -> None:
    images, texts, scale = vectors(5, 2), vectors(5, 3), torch.tensor([7.0])
    pairs = Vectors(images, texts, scale)
    with_classes = replace(pairs, labels=torch.tensor([[4], [0], [2], [9], [1]]))
    torch.testing.assert_close(softmax_contrast(with_classes), softmax_contrast(pairs))


def test_the_closest_names_are_found_and_read_once_for_the_same_weights(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "text.spm")
    tokenizer = TextTokenizer(str(tmp_path / "text.spm"))
    config: Any = SimpleNamespace(data=SimpleNamespace(text_length=10), name_smoothing=0.0)
    task = ImageNetRetrieval(config, tokenizer, NAMES)
    model = ImageNetRetrieval.network(MODEL).eval()
    read: list[int] = []
    embed_texts = partial(task.embed_texts, model)
    task.embed_texts = lambda _, *texts: read.append(len(texts[0])) or embed_texts(*texts)  # type: ignore
    images = torch.randn(6, 1, 3, 16, 16)
    inputs = TaskInputs(images, torch.empty(6, 0, dtype=torch.int64), torch.empty(6, 0, dtype=torch.bool),
                        torch.arange(6), torch.arange(6))  # fmt: skip

    def by_hand() -> list[list[int]]:
        words = [[tokenizer.bos, *tokenizer.encode(name)[:8], tokenizer.eos] for name in NAMES]
        texts = [embed_texts(torch.tensor([row]), torch.zeros(1, len(row), dtype=torch.bool))[0] for row in words]
        scores = [[float(text @ image) for text in texts] for image in task.embed_images(model, images[:, 0])]
        return [sorted(range(5), key=lambda name, row=row: -row[name]) for row in scores]

    with torch.no_grad():
        assert task.predict(model, inputs).tolist() == by_hand()
        assert task.predict(model, inputs).tolist() == by_hand() and read == [5]
        words = torch.tensor([[0, 7, 2]] * 6)
        task.losses(model, TaskInputs(images, words, words == 1, torch.arange(6) % 2, torch.arange(6)))
        model.task_head.language_head.weight.neg_()  # as a step would change it
        assert task.predict(model, inputs).tolist() == by_hand() and read == [5, 5]
