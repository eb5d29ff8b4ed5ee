"""Predictions as files, in the forms that several benchmarks' evaluations take."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_classes(folder: Path, names: Sequence[str], classes: Sequence[int]) -> Path:
    """classes.csv, a table `name,class`: file name of an image, or number of a sentence, and number of its class."""
    return write_csv(folder / "classes.csv", [("name", "class"), *zip(names, classes, strict=True)])


def write_json(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records as one list."""
    path.write_text(json.dumps(records, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    """The rows, without a header of their own."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path
