"""How good predictions are: recall of retrieval, scores of captions, top-k of classes.

VQA's accuracy is in `vqa_answers`.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from beit3_dist.optional import optional_module

Key = TypeVar("Key", bound=Hashable)
More = tuple[Tensor, Tensor]
"""What is added to the scores of images for N texts, [N, M], and to those of texts for M images, [M, N]."""

RECALL_AT = (1, 5, 10)
ROWS_AT_ONCE = 1024
"""Rows of the score matrix that exist at a time."""
CAPTION_METRICS = ("exact_match", "bleu4", "cider", "meteor", "spice")
SPICE_PARSER = "lib/stanford-corenlp-3.6.0.jar"
"""What SPICE needs besides its package, in that package's folder `spice`."""


def top_k(predictions: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """top1, and top5 where there are five: share of the labels among the first of int64 [N, k], best class first."""
    hits = predictions == torch.tensor(labels)[:, None]
    return {f"top{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5) if k <= predictions.shape[1]}


def agreement(guesses: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """accuracy, matthews (Gorodkin 2004 for more than two classes) and, of two, f1 of the second, of int64 [N] each. A
    ratio without a denominator is 0."""
    table = torch.bincount(labels * classes + guesses, minlength=classes**2).view(classes, classes).double()
    told, true, right, count = table.sum(0), table.sum(1), table.diag().sum(), table.sum()
    spread = (count**2 - told @ told) * (count**2 - true @ true)
    matthews = (right * count - told @ true) / spread.sqrt() if spread > 0 else torch.zeros(())
    scores = {"accuracy": (right / count).item(), "matthews": matthews.item()}
    if classes == 2:
        both = told[1] + true[1]
        scores["f1"] = (2 * table[1, 1] / both).item() if both > 0 else 0.0
    return scores


def overlaps(confusion: Tensor) -> tuple[dict[str, float], tuple[list[float], list[float], list[int]]]:
    """Of a confusion int64 [classes, classes], pixels by their class and what they are taken for: miou, mean_accuracy
    and pixel_accuracy, and by class the intersection over union, the share that is found, and the pixels. A class of no
    pixel that nothing is taken for is NaN, and counts in no mean (mmsegmentation)."""
    table = confusion.double()
    right, true, told = table.diag(), table.sum(1), table.sum(0)
    ious, accuracies = right / (true + told - right), right / true
    scores = {
        "miou": ious.nanmean().item(),
        "mean_accuracy": accuracies.nanmean().item(),
        "pixel_accuracy": (right.sum() / true.sum()).item(),
    }
    return scores, (ious.tolist(), accuracies.tolist(), confusion.sum(1).tolist())


def correlations(guesses: Tensor, labels: Tensor) -> dict[str, float]:
    """pearson and spearman of numbers [N] each; 0 where either is all alike."""
    ranks = [_ranks_of(values.double()) for values in (guesses, labels)]
    return {"pearson": _pearson(guesses.double(), labels.double()), "spearman": _pearson(*ranks)}


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return (a @ b / norm).item() if norm > 0 else 0.0


def _ranks_of(values: Tensor) -> Tensor:
    """Ranks from 1; equal values have the mean of theirs."""
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)
    return (last - (sizes - 1) / 2).double()[group]


def first_rows(keys: Iterable[Key]) -> dict[Key, int]:
    """The row in which each key comes first, in the order of these rows."""
    first: dict[Key, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return first


def recall(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    row_of_text: Tensor | None = None,
    more: More | None = None,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 of images for texts and of texts for images.

    Vectors [M, D] and [N, D] whose product is the score, and int64 [N]: the image that each text belongs to. With
    `row_of_text`, int64 like `image_of_text`, a text may belong to several: pair i is of an image and of that row of
    the texts. `more`: what is added to the scores.

    A rank is that of the best of what belongs there. A wrong candidate with the same score as the right one comes
    before it: a model that cannot tell anything apart finds nothing.
    """
    rows = torch.arange(len(texts)) if row_of_text is None else row_of_text
    for_texts, for_images = more or (None, None)
    ranks = {
        "image_recall": _ranks(texts, images, rows, image_of_text, for_texts),
        "text_recall": _ranks(images, texts, image_of_text, rows, for_images),
    }
    return {f"{name}@{k}": (rank < k).double().mean().item() for name, rank in ranks.items() for k in RECALL_AT}


def _ranks(queries: Tensor, candidates: Tensor, query: Tensor, candidate: Tensor, more: Tensor | None) -> Tensor:
    """int64 [queries]: before the best of its candidates, so many wrong ones. Pair i, int64 [P], belongs together."""
    ranks = []
    for rows in torch.arange(len(queries)).split(ROWS_AT_ONCE):
        scores = queries[rows] @ candidates.T
        if more is not None:
            scores = scores + more[rows]
        mine, own = (query >= rows[0]) & (query <= rows[-1]), torch.zeros_like(scores, dtype=torch.bool)
        own[query[mine] - rows[0], candidate[mine]] = True
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        ranks.append(((scores >= best) & ~own).sum(1))
    return torch.cat(ranks)


def shortlists(images: Tensor, texts: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """The `best` images of each text, and the `best` texts of each image, by vectors as in `recall`: bool [M, N]."""
    scores = images @ texts.T
    chosen = [torch.zeros_like(scores, dtype=torch.bool) for _ in range(2)]
    for dim, among in enumerate(chosen):
        among.scatter_(dim, scores.topk(min(best, scores.shape[dim]), dim).indices, True)
    return chosen[0], chosen[1]


def reranked(chosen: tuple[Tensor, Tensor], pairs: Tensor, logits: Tensor) -> More:
    """What `recall` adds, so that the `shortlists` are in the order of matching's logits and the similarities (BLIP's
    sum), and before all others. `logits` [P] are of the pairs int64 [P, 2], which either list has."""
    lifted = torch.zeros(chosen[0].shape, dtype=torch.float64)
    # A similarity is never more than 2 above another.
    lifted[tuple(pairs.T)] = logits.double() - logits.double().min() + 2
    by_text, by_image = (torch.where(among, lifted, 0) for among in chosen)
    return by_text.T, by_image


def check_caption_metrics(names: Sequence[str]) -> None:
    """Raises ValueError with the remedy where a caption metric is unknown or lacks what it runs on."""
    for name in names:
        if name not in CAPTION_METRICS:
            raise ValueError(f"there is no caption metric {name!r}, only {', '.join(CAPTION_METRICS)}")
        if name == "exact_match":
            continue
        package = Path(_package("pycocoevalcap.bleu.bleu").__file__).parent.parent
        if name in ("meteor", "spice") and shutil.which("java") is None:
            raise ValueError(f"the caption metric {name} needs Java: install a Java runtime, or leave it out")
        if name == "spice" and not (package / "spice" / SPICE_PARSER).is_file():
            raise ValueError(
                f"the caption metric spice needs {SPICE_PARSER} in {package / 'spice'}: run get_stanford_models.py of "
                "that folder, which downloads it, or leave spice out"
            )


def _package(name: str) -> Any:
    """pycocoevalcap or a module of it. Raises ValueError if it is not installed."""
    remedy = "pip install --no-deps pycocoevalcap (105 MB), or ask for exact_match only"
    return optional_module(name, "BLEU, CIDEr, METEOR or SPICE", remedy)


def caption_scores(
    written: Mapping[int, str], references: Mapping[int, Sequence[str]], metrics: Sequence[str] = ("exact_match",)
) -> dict[str, float]:
    """Metrics of a caption for each image, by the captions that people wrote; names as in CAPTION_METRICS.

    exact_match: share of captions that are one of the references, but for case and space. The others are
    pycocoevalcap's, on the words of the Penn Treebank tokenizer, which needs Java. Without Java they are on words of
    lower-case letters and digits, and `_plain_words` is added to their names: such values are not to be compared with
    published ones. Raises ValueError as `check_caption_metrics` does, or where images and references differ.
    """
    check_caption_metrics(metrics)
    if written.keys() != references.keys() or not written:
        raise ValueError("captions and references are not for the same images, or for none")
    scores: dict[str, float] = {}
    if "exact_match" in metrics:
        plain = {key: _plain(text) for key, text in written.items()}
        scores["exact_match"] = sum(plain[key] in map(_plain, references[key]) for key in plain) / len(plain)
    others = [name for name in metrics if name != "exact_match"]
    if others:
        with_java = shutil.which("java") is not None
        guesses, truths = (
            _tokenized(texts, with_java) for texts in ({key: [text] for key, text in written.items()}, references)
        )
        for name in others:
            scores[name if with_java else f"{name}_plain_words"] = _coco_score(name, truths, guesses)
    return scores


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _tokenized(captions: Mapping[int, Sequence[str]], with_java: bool) -> dict[int, list[str]]:
    """Captions as words parted by spaces, without punctuation."""
    if with_java:
        records = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
        return _package("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer().tokenize(records)
    kept = {
        key: ["".join(c if c.isalnum() else " " for c in text.lower()) for text in captions[key]] for key in captions
    }
    return {key: [" ".join(text.split()) for text in texts] for key, texts in kept.items()}


def _coco_score(name: str, truths: dict[int, list[str]], guesses: dict[int, list[str]]) -> float:
    module = "bleu" if name == "bleu4" else name
    scorer = getattr(_package(f"pycocoevalcap.{module}.{module}"), module.capitalize())()
    with contextlib.redirect_stdout(io.StringIO()):  # It prints lengths.
        score, _ = scorer.compute_score(truths, guesses)
    return float(score[3] if name == "bleu4" else score)
