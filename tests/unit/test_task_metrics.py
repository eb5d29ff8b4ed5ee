"""Metrics of downstream tasks against values by hand, brute force, and the package that published scores come from."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from itertools import combinations

import pytest
import torch

from beit3_dist.tasks.data.vqa_answers import accuracy, normalised, soft_scores
from beit3_dist.tasks.parts import metrics
from beit3_dist.tasks.parts.metrics import caption_scores, check_caption_metrics, recall, top_k

# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Two", "2"),
        ("none", "0"),
        ("the red Ball.", "red ball"),
        ("An apple\n", "apple"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),  # two apostrophes are missing: not in the benchmark's list
        ("couldnt've", "couldn't've"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("yes, sir", "yes sir"),
        ("t-shirt", "t shirt"),
        ("12:30", "12:30"),
        ("men's", "men's"),
        ("ten-four", "10 4"),
    ],
)
def test_answers_are_compared_in_the_benchmarks_form(given: str, expected: str) -> None:
    assert normalised(given) == expected
    assert normalised(expected) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_by_hand_and_by_leaving_one_out(count: int, expected: float) -> None:
    answers = ["yes"] * count + ["no"] * (10 - count)
    assert accuracy("yes", answers) == pytest.approx(expected)
    assert soft_scores(answers).get("yes", 0) == expected
    # The definition that the benchmark prints: the mean over all sets of nine people.
    nines = [min(1, sum(answer == "yes" for answer in nine) / 3) for nine in combinations(answers, 9)]
    assert accuracy("yes", answers) == pytest.approx(sum(nines) / len(nines))


def test_accuracy_sees_through_spelling() -> None:
    answers = ["2", "two", "Two.", "a two", "3", "3", "3", "3", "many", "lots"]
    assert accuracy("TWO", answers) == 1.0
    assert accuracy("many", answers) == pytest.approx(0.3)
    assert accuracy("lot", answers) == 0.0
    assert soft_scores(answers) == {"2": 1.0, "3": 1.0, "many": 0.3, "lots": 0.3}


# ---------------------------------------------------------------------------------------------------- ranks and classes


def brute_force(images: torch.Tensor, texts: torch.Tensor, owners: list[int]) -> dict[str, float]:
    """Recall by sorting each list of candidates; right ones come after wrong ones of the same score."""
    found: dict[str, list[bool]] = {f"{side}_recall@{k}": [] for side in ("image", "text") for k in (1, 5, 10)}
    for number, owner in enumerate(owners):
        order = sorted(range(len(images)), key=lambda i: (-float(texts[number] @ images[i]), i == owner))
        for k in (1, 5, 10):
            found[f"image_recall@{k}"].append(owner in order[:k])
    for number in range(len(images)):
        order = sorted(range(len(texts)), key=lambda i: (-float(images[number] @ texts[i]), owners[i] == number))
        for k in (1, 5, 10):
            found[f"text_recall@{k}"].append(any(owners[i] == number for i in order[:k]))
    return {name: sum(hits) / len(hits) for name, hits in found.items()}


@pytest.mark.parametrize("rows_at_once", [1024, 7])
def test_recall_equals_brute_force(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(metrics, "ROWS_AT_ONCE", rows_at_once)
    rng = torch.Generator().manual_seed(0)
    owners = [0, 0, 0] + [number for number in range(1, 30) for _ in range(1 + number % 3)]
    images = torch.randn(30, 6, generator=rng)
    texts = images[owners] + 1.5 * torch.randn(len(owners), 6, generator=rng)
    result = recall(images, texts, torch.tensor(owners))
    assert result == pytest.approx(brute_force(images, texts, owners))
    assert 0.05 < result["image_recall@1"] < result["image_recall@10"] < 1  # neither trivial end is tested


def test_recall_of_scores_with_ties() -> None:
    rng = torch.Generator().manual_seed(0)
    images, texts = torch.randint(-1, 2, (12, 2), generator=rng).float(), torch.eye(2).repeat(12, 1)
    owners = [number % 12 for number in range(24)]
    assert recall(images, texts, torch.tensor(owners)) == pytest.approx(brute_force(images, texts, owners))


def test_recall_of_texts_that_belong_to_several_images() -> None:
    images, texts = torch.eye(4)[:, :3], torch.tensor([[3.0, 1.0, 2.0], [0.0, 2.0, 3.0]])
    # Scores of the texts: [3, 1, 2, 0] and [0, 2, 3, 0]. The first is of images 0 and 1, the second of 1, 2 and 3.
    found = recall(images, texts, torch.tensor([0, 1, 1, 2, 3]), torch.tensor([0, 0, 1, 1, 1]))
    assert found["image_recall@1"] == 1.0
    assert found["text_recall@1"] == 0.75  # the last image's score is the same for both texts
    assert found["text_recall@5"] == 1.0


def test_a_model_that_gives_everything_one_vector_recalls_nothing() -> None:
    assert set(recall(torch.ones(20, 3), torch.ones(20, 3), torch.arange(20)).values()) == {0.0}


def test_top_k() -> None:
    predictions = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [9, 8, 7, 6, 5]])
    assert top_k(predictions, [0, 0, 0]) == pytest.approx({"top1": 1 / 3, "top5": 2 / 3})
    assert top_k(predictions[:, :2], [1, 4, 0]) == pytest.approx({"top1": 1 / 3})


# ------------------------------------------------------------------------------------------------------------- captions

WRITTEN = {7: "a red circle", 9: "The blue  square"}
REFERENCES: Mapping[int, list[str]] = {7: ["a circle", "a green circle"], 9: ["the blue square", "one square"]}


def test_exact_match_needs_no_package() -> None:
    assert caption_scores(WRITTEN, REFERENCES) == {"exact_match": 0.5}
    with pytest.raises(ValueError, match="not for the same images"):
        caption_scores({7: "a"}, REFERENCES)


def test_what_a_metric_lacks_is_said_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no caption metric 'rouge'"):
        check_caption_metrics(["rouge"])
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ValueError, match="pip install --no-deps pycocoevalcap"):
        check_caption_metrics(["exact_match", "cider"])
    check_caption_metrics(["exact_match"])


def test_java_metrics_without_java_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(metrics.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="meteor needs Java"):
        check_caption_metrics(["meteor"])


def test_bleu_and_cider_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(metrics.shutil, "which", lambda _: None)
    same = {key: f"one two three four {key} five" for key in range(3)}
    scores = caption_scores(same, {key: [text] for key, text in same.items()}, ["bleu4", "cider"])
    # A caption that is its reference: BLEU 1, and each of CIDEr's four cosines is 1, times 10.
    assert scores == pytest.approx({"bleu4_plain_words": 1.0, "cider_plain_words": 10.0}, abs=1e-6)
    half = {0: "a b c d e z"}
    # Matches of 6, 5, 4 and 3 n-grams: 5, 4, 3, 2. Lengths are equal, so nothing is taken off.
    expected = math.prod((5 / 6, 4 / 5, 3 / 4, 2 / 3)) ** 0.25
    assert caption_scores(half, {0: ["A b, c d e f."]}, ["bleu4"])["bleu4_plain_words"] == pytest.approx(expected)


@pytest.mark.slow
def test_with_java_the_words_are_those_of_published_scores() -> None:
    pytest.importorskip("pycocoevalcap")
    if metrics.shutil.which("java") is None:
        pytest.skip("there is no Java")
    text = "a man doesn't ride the horse"
    scores = caption_scores({0: "A man doesn't ride, the horse."}, {0: [text, "two men"]}, ["bleu4", "meteor"])
    assert scores == pytest.approx({"bleu4": 1.0, "meteor": 1.0}, abs=1e-6)
