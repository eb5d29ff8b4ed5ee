"""The files of a task of GLUE (Wang et al. 2019) as records of indexes: SIDE.tsv as its site has them, or .jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from beit3_dist.config import require
from beit3_dist.data.kinds import LeftOut, leave_out
from beit3_dist.data.text_files import read_lines, read_records
from beit3_dist.tasks.data.benchmarks import Indexes

PAIRS = {
    "sentence1": "sentence2",  # MRPC (jsonl), RTE, STS-B, WNLI, MNLI (tsv)
    "premise": "hypothesis",  # MNLI
    "question": "sentence",  # QNLI
    "question1": "question2",  # QQP
    "#1 String": "#2 String",  # MRPC
}
"""Field of the first text -> that of the second."""
ALONE = "sentence"  # CoLA, SST-2
LABELS = ("gold_label", "label", "is_duplicate", "Quality", "score")
"""Fields of the label; the first that is there."""
IDS = ("index", "idx", "id")
COLA = ("source", "label", "star", "sentence")
"""Columns of CoLA's train.tsv and dev.tsv, which have no line that names them."""
NO_LABEL = ("", "-", "-1", "-1.0", "hidden")
"""What test sets have in the place of a label."""
NUMBER = "number"
"""The one name of what is told where labels are numbers with fractions."""

Row = tuple[str, dict[str, str]]
"""Where it stands, and its fields."""


def glue(folder: Path, left_out: LeftOut) -> tuple[Indexes, list[str]]:
    """Indexes of the sides of a task, and the names of its classes: those of train.tsv (or .jsonl) in their order, or
    `number` alone where a label has a fraction. Lines of a table with another number of fields than its header are
    counted, as QQP has some. Raises ValueError naming file and line where a text or a class cannot be told."""
    require(folder.is_dir(), f"there is no folder {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".tsv", ".jsonl"))
    sides = {
        path.stem: _rows(path, left_out) for path in paths if path.stem.startswith(("train", "dev", "test", "val"))
    }
    require("train" in sides, f"{folder} has no train.tsv and no train.jsonl")
    rows = {side: list(found) for side, found in sides.items()}
    known = {_label(fields) for _, fields in rows["train"]} - {None}
    require(bool(known), f"{folder}: no line of train has a label")
    names = names_of_classes(set(map(str, known)))
    labels = None if names == [NUMBER] else {name: label for label, name in enumerate(names)}
    return {
        f"{side}.jsonl": [_record(place, fields, labels) for place, fields in found] for side, found in rows.items()
    }, names


def names_of_classes(known: Set[str]) -> list[str]:
    """The names of the classes that some labels are, in their order, or `NUMBER` alone where one has a fraction."""
    numbers = [number_in(label) for label in known]
    if any(value is not None and not value.is_integer() for value in numbers):
        return [NUMBER]
    return sorted(known, key=str if None in numbers else float)


def _record(place: str, fields: dict[str, str], labels: dict[str, int] | None) -> dict[str, Any]:
    """`labels`: number of each class; None: a label is a number."""
    first = next((name for name in PAIRS if name in fields and PAIRS[name] in fields), ALONE)
    require(first in fields, f"{place}: no text of GLUE's: neither {ALONE!r} nor {first!r} and its second")
    record: dict[str, Any] = {"text": fields[first]}
    if first in PAIRS:
        record["text2"] = fields[PAIRS[first]]
    for name in ("text", "text2"):
        require(bool(record.get(name, "-").strip()), f"{place}: an empty sentence")
    label = _label(fields)
    if label is not None and labels is None:
        number = number_in(label)
        require(number is not None, f"{place}: the label {label!r} is no number, as others are")
        record["label"] = number
    elif label is not None and labels is not None:
        require(label in labels, f"{place}: the class {label!r} is none of train's: {', '.join(labels)}")
        record["label"] = labels[label]
    else:
        record["label"] = None
    if (id := next((fields[name] for name in IDS if name in fields), None)) is not None:
        record["idx"] = id
    return record


def _label(fields: dict[str, str]) -> str | None:
    """None where a line has none."""
    found = next((fields[name] for name in LABELS if name in fields), "").strip()
    return None if found.lower() in NO_LABEL else found


def number_in(label: str) -> float | None:
    """The finite number that a label is; None for any other."""
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _rows(path: Path, left_out: LeftOut) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        for place, record in read_records(path):
            require(isinstance(record, dict), f"{place}: no JSON object")
            yield place, {name: "" if value is None else str(value) for name, value in record.items()}
        return
    header: tuple[str, ...] = ()
    for number, line in read_lines(path):
        fields, place = line.split("\t"), f"{path}, line {number}"
        if not header:
            is_cola = len(fields) == len(COLA) and fields[1] in ("0", "1")
            header = COLA if is_cola else tuple(fields)
            if not is_cola:
                continue
        if len(fields) == len(header):
            yield place, dict(zip(header, fields, strict=True))
        else:
            leave_out(left_out, f"without the {len(header)} fields of {path.name}", place)
