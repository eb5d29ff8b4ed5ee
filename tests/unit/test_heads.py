"""Downstream models: their sizes are the released ones', their heads compute what their definitions say."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from beit3_dist.config import ModelConfig
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.registry import task_class

RELEASED: dict[str, Any] = {
    "patch_size": 16,
    "attention": "per_modality",
    "sub_layernorm": True,
    "vl_expert_layers": 0,
    "max_text_length": 1022,
}
BASE = RELEASED | {"layers": 12, "width": 768, "heads": 12, "ffn_width": 3072}
LARGE = RELEASED | {"layers": 24, "width": 1024, "heads": 16, "ffn_width": 4096}
ANSWERS, CLASSES = 3129, 1000
TINY = ModelConfig(layers=2, width=32, heads=2, ffn_width=48, patch_size=8, image_size=32, vocab_size=40,
                   visual_vocab_size=8, vl_expert_layers=1, max_text_length=16)  # fmt: skip


@pytest.mark.parametrize(
    ("geometry", "task", "size", "classes", "millions"),
    [  # the figures of unilm's README
        (BASE, "vqa", 480, ANSWERS, 228),
        (LARGE, "vqa", 480, ANSWERS, 683),
        (BASE, "nlvr2", 224, 0, 226),
        (BASE, "captioning", 480, 0, 271),
        (LARGE, "captioning", 480, 0, 739),
        (BASE, "retrieval", 384, 0, 222),
        (LARGE, "retrieval", 384, 0, 675),
        (BASE, "itc", 224, 0, 222),
        (LARGE, "itc", 224, 0, 675),
    ],
)
def test_parameter_counts_are_the_released_ones(
    geometry: dict[str, Any], task: str, size: int, classes: int, millions: int
) -> None:
    model = task_class(task).network(ModelConfig(image_size=size, **geometry), classes, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(("geometry", "millions"), [(BASE, 87), (LARGE, 305)])
def test_the_vision_side_of_a_classifier_has_the_released_size(geometry: dict[str, Any], millions: int) -> None:
    model = task_class("imagenet").network(ModelConfig(image_size=224, **geometry), CLASSES, device="meta")
    vision = [p.numel() for name, p in model.named_parameters() if "language" not in name]
    assert round(sum(vision) / 1e6) == millions


def test_two_pictures_with_one_sentence_are_two_pairs() -> None:
    """Each of the pictures gets its own pass with the sentence; the order of the pictures matters."""
    nlvr2: Any = task_class("nlvr2")
    model = nlvr2.network(TINY).eval()
    for name in ("dense1", "dense2"):  # as large as other matrices, so that differences show
        model.task_head.head.get_parameter(f"{name}.weight").data.mul_(1000)
    images = torch.randn(3, 2, 3, 32, 32)
    words, padding = torch.randint(4, 40, (3, 6)), torch.arange(6) >= torch.tensor([[6], [4], [5]])

    def logits(images: torch.Tensor) -> torch.Tensor:
        none = torch.empty(3, dtype=torch.int64)
        return nlvr2.logits(None, model, TaskInputs(images, words, padding, labels=none, keys=none))

    got = logits(images)
    tokens = [
        model.encode(images[b : b + 1, k], words[b : b + 1, :length], None)[0, [0, 1 + TINY.patches]].flatten()
        for b, length in enumerate((6, 4, 5))
        for k in (0, 1)
    ]
    head = model.task_head.head
    joined = torch.stack([torch.cat(tokens[2 * b : 2 * b + 2]) for b in range(3)])
    torch.testing.assert_close(got, head(joined), rtol=1e-4, atol=1e-5)
    swapped = logits(images.flip(1))
    assert not torch.allclose(swapped, got, rtol=1e-2, atol=1e-3)


def test_embeddings_are_unit_vectors_and_padding_does_not_count() -> None:
    retrieval: Any = task_class("retrieval")
    model, texts_of = retrieval.network(TINY).eval(), partial(retrieval.embed_texts, None)
    words = torch.randint(4, 40, (2, 6))
    padding = torch.tensor([[False] * 6, [False] * 3 + [True] * 3])
    texts = texts_of(model, words, padding)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(texts[1:], texts_of(model, words[1:, :3], padding[1:, :3]), rtol=1e-4, atol=1e-6)
    assert model.task_head(None, None)[2].item() == pytest.approx(1 / 0.07)


def test_first_predictions_are_even_where_the_released_ones_are() -> None:
    """Matrices of ImageNet's and NLVR2's classifiers start a thousand times smaller than others; VQA's do not."""
    for task, classifiers in (
        ("imagenet", ["head"]), ("nlvr2", ["head.dense1", "head.dense2"]), ("vqa", []),
    ):  # fmt: skip
        weights = {n: p for n, p in task_class(task).network(TINY, 10).task_head.named_parameters() if p.ndim == 2}
        small = [name.removesuffix(".weight") for name, weight in weights.items() if weight.std() < 1e-3]
        assert small == classifiers


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match="task='drawing' is not one of captioning, detection, imagenet"):
        task_class("drawing")
