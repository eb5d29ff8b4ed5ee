"""Predictions as files, in the form that each benchmark's evaluation takes.

Every writer takes the folder, gives the file its name, and returns its path.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.tasks.metrics import first_rows

BEST = 10
"""Candidates that `write_retrieval` keeps of each ranking."""
ROWS_AT_ONCE = 1024
"""Rows of the score matrix that exist at a time."""


def write_vqa(folder: Path, question_ids: Sequence[str], answers: Sequence[str]) -> Path:
    """VQA v2's vqa_results.json: a list of {question_id, answer}."""
    return _write_json(
        folder / "vqa_results.json",
        [{"question_id": int(id), "answer": answer} for id, answer in zip(question_ids, answers, strict=True)],
    )


def write_captions(folder: Path, image_ids: Sequence[str], captions: Sequence[str]) -> Path:
    """COCO's and NoCaps' captions_results.json: a list of {image_id, caption}.

    Raises ValueError where a picture comes twice: the evaluation would refuse the file.
    """
    path = folder / "captions_results.json"
    if len(set(image_ids)) < len(image_ids):
        raise ValueError(f"{path}: a picture has two captions, and the benchmark takes one")
    return _write_json(
        path, [{"image_id": int(id), "caption": caption} for id, caption in zip(image_ids, captions, strict=True)]
    )


def write_nlvr2(folder: Path, identifiers: Sequence[str], predictions: Sequence[bool]) -> Path:
    """NLVR2's nlvr2_predictions.csv: `identifier,True` or `identifier,False` a line, without a header."""
    rows = [(id, str(bool(truth))) for id, truth in zip(identifiers, predictions, strict=True)]
    return _write_csv(folder / "nlvr2_predictions.csv", rows)


def write_classes(folder: Path, names: Sequence[str], classes: Sequence[int]) -> Path:
    """classes.csv, a table `name,class`: file name of a picture, or number of a sentence, and number of its class."""
    return _write_csv(folder / "classes.csv", [("name", "class"), *zip(names, classes, strict=True)])


def write_retrieval(folder: Path, image_of_text: Sequence[str], images: Tensor, texts: Tensor) -> Path:
    """retrieval.jsonl: the ten best pictures of each text, and the ten best texts of each picture, with their scores.

    Row i is text i, vectors [N, D], and the picture that it belongs to; a picture that comes several times is taken
    from its first row. A text is called by its row, a picture by its name.
    """
    first = first_rows(image_of_text)
    names, pictures = list(first), images[list(first.values())]
    path = folder / "retrieval.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for row, (places, scores) in enumerate(_best(texts, pictures)):
            record: dict[str, Any] = {"text": row, "images": [names[place] for place in places], "scores": scores}
            file.write(json.dumps(record) + "\n")
        for name, (places, scores) in zip(names, _best(pictures, texts), strict=True):
            file.write(json.dumps({"image": name, "texts": places, "scores": scores}) + "\n")
    return path


def _best(queries: Tensor, candidates: Tensor) -> Iterable[tuple[list[int], list[float]]]:
    """Places and scores of the best candidates of each query, best first."""
    for rows in torch.arange(len(queries)).split(ROWS_AT_ONCE):
        best = (queries[rows] @ candidates.T).topk(min(BEST, len(candidates)))
        for places, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            yield places, [round(score, 5) for score in scores]


def _write_json(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path
