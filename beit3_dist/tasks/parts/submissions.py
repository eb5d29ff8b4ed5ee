"""Predictions as files, in the forms that several benchmarks' evaluations take."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from beit3_dist.data.cache import write_whole


def write_classes(folder: Path, names: Sequence[str], classes: Sequence[int]) -> Path:
    """classes.csv, a table `name,class`: file name of an image, or number of a sentence, and number of its class."""
    return write_csv(folder / "classes.csv", [("name", "class"), *zip(names, classes, strict=True)])


def write_results(path: Path, ids: Sequence[str], id_field: str, results: Sequence[str], field: str) -> Path:
    """A JSON list of {id_field, field}, as the evaluations of VQA v2, COCO and NoCaps take it. Raises ValueError where
    an id comes twice: the evaluation would refuse the file."""
    if len(set(ids)) < len(ids):
        raise ValueError(f"{path}: one {id_field} has two of {field}, and the benchmark takes one")
    records = [{id_field: int(id), field: result} for id, result in zip(ids, results, strict=True)]
    path.write_text(json.dumps(records, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_numbers(path: Path, numbers: np.ndarray) -> None:
    """A picture of numbers [H, W], one a pixel, in 8 bits where they fit, else in 16: as ADE20K's server takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = np.uint8 if numbers.max(initial=0) < 256 else np.uint16
    data = io.BytesIO()
    Image.fromarray(numbers.astype(kind)).save(data, "PNG")
    write_whole(path, lambda file: file.write(data.getvalue()), "out")


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path
