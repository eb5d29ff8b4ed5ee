"""Predictions as files, in the form that each benchmark's evaluation takes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BEST = 10
"""Candidates that `write_retrieval` keeps of each ranking."""
ROWS_AT_ONCE = 1024
"""Rows of the score matrix that exist at a time."""


def write_vqa(path: Path, question_ids: Sequence[str], answers: Sequence[str]) -> None:
    """VQA v2's result file: a JSON list of {question_id, answer}."""
    _write_json(
        path,
        [{"question_id": int(id), "answer": answer} for id, answer in zip(question_ids, answers, strict=True)],
    )


def write_captions(path: Path, image_ids: Sequence[str], captions: Sequence[str]) -> None:
    """COCO's and NoCaps' result file: a JSON list of {image_id, caption}, one caption per picture.

    Raises ValueError where a picture comes twice: the evaluation would refuse the file.
    """
    if len(set(image_ids)) < len(image_ids):
        raise ValueError(f"{path}: a picture has two captions, and the benchmark takes one")
    _write_json(
        path, [{"image_id": int(id), "caption": caption} for id, caption in zip(image_ids, captions, strict=True)]
    )


def write_nlvr2(path: Path, identifiers: Sequence[str], predictions: Sequence[bool]) -> None:
    """NLVR2's prediction file: `identifier,True` or `identifier,False` a line; a JSON list of {identifier, prediction}
    where the path ends in .json."""
    rows = [(id, str(truth)) for id, truth in zip(identifiers, predictions, strict=True)]
    if path.suffix == ".json":
        _write_json(path, [{"identifier": id, "prediction": truth} for id, truth in rows])
    else:
        _write_csv(path, rows)


def write_classes(path: Path, names: Sequence[str], classes: Sequence[int]) -> None:
    """A table `name,class`: file name of a picture, or number of a sentence, and number of its class."""
    _write_csv(path, [("name", "class"), *zip(names, classes, strict=True)])


def write_retrieval(path: Path, image_of_text: Sequence[str], images: Tensor, texts: Tensor) -> None:
    """The ten best pictures of each text, and the ten best texts of each picture, with their scores: JSON lines.

    Row i is text i, vectors [N, D], and the picture that it belongs to; a picture that comes several times is taken
    from its first row. A text is called by its row, a picture by its name.
    """
    first: dict[str, int] = {}
    for row, name in enumerate(image_of_text):
        first.setdefault(name, row)
    names, pictures = list(first), images[list(first.values())]
    with open(path, "w", encoding="utf-8") as file:
        for row, (places, scores) in enumerate(_best(texts, pictures)):
            record: dict[str, Any] = {"text": row, "images": [names[place] for place in places], "scores": scores}
            file.write(json.dumps(record) + "\n")
        for name, (places, scores) in zip(names, _best(pictures, texts), strict=True):
            file.write(json.dumps({"image": name, "texts": places, "scores": scores}) + "\n")


def _best(queries: Tensor, candidates: Tensor) -> Iterable[tuple[list[int], list[float]]]:
    """Places and scores of the best candidates of each query, best first."""
    for rows in torch.arange(len(queries)).split(ROWS_AT_ONCE):
        best = (queries[rows] @ candidates.T).topk(min(BEST, len(candidates)))
        for places, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            yield places, [round(score, 5) for score in scores]


def _write_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
