"""The names of what a head tells apart, its answers or classes, as files have them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from beit3_dist.config import require
from beit3_dist.data.text_files import read_lines, read_records, require_text

MARKS = {"\ufeff": "a byte order mark", "\0": "a zero byte", "\n": "a newline"}
"""What no name holds that a person has written."""
HIDDEN = re.compile(r"\.[^\W\d]|__MACOSX$")
"""`.DS_Store`, `.ipynb_checkpoints`, but not `.5`."""


def read_names(path: Path) -> list[str]:
    """The answers (or names of classes) in the order of their labels: one a line, unilm's answer2label.txt of JSON
    lines, or a JSON array. Raises ValueError naming file and line where the list cannot be meant, see `check_names`."""
    require(path.is_file(), f"there is no file {path}")
    first = next((line for _, line in read_lines(path)), "")
    read = _by_label if first.startswith("{") else read_records if first.startswith("[") else _by_line
    names = list(read(path))
    require(bool(names), f"{path} holds no name")
    check_names(names)
    return [name for _, name in names]


def _by_line(path: Path) -> list[tuple[str, str]]:
    """Place and name of each line; empty ones at the end are none."""
    lines = list(read_lines(path))
    while lines and not lines[-1][1].strip():
        lines.pop()
    for number, name in lines:
        require(bool(name.strip()), f"{path}, line {number} is empty: the names after it would get other labels")
    return [(f"{path}, line {number}", name) for number, name in lines]


def _by_label(path: Path) -> list[tuple[str, str]]:
    """Place and answer of each record {answer, label}, in the order of the labels."""
    records: dict[int, tuple[str, str]] = {}
    for place, record in read_records(path):
        label = record.get("label") if isinstance(record, dict) else None
        if type(label) is not int or "answer" not in record:
            raise ValueError(f"{place}: no answer, or no label that is an integer")
        if label in records:
            raise ValueError(f"{place}: label {label} is also that of {records[label][0]}")
        records[label] = place, record["answer"]
    for label in range(len(records)):
        require(label in records, f"{path}: there is no answer of label {label}, but of larger ones")
    return [records[label] for label in range(len(records))]


def check_names(names: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError at the first place whose name of an answer or class cannot be meant: one that is no text, holds
    a byte order mark, a newline or a zero byte, begins like a hidden file, or comes twice.

    An empty name is one of VQA v2's 3,129 answers (what people said was an article), so that it is refused only where
    nothing but an empty line says it.
    """
    places: dict[str, str] = {}
    for place, name in names:
        require(isinstance(name, str), f"{place}: {name!r} is no text, which a name is")
        require_text(name, place)
        if found := next((mark for mark in MARKS if mark in name), ""):
            raise ValueError(f"{place}: the name {name!r} holds {MARKS[found]}, as no name does that is meant")
        require(not HIDDEN.match(name), f"{place}: {name!r} is named like a hidden file, and no answer or class")
        if (other := places.setdefault(name.strip(), place)) != place:
            raise ValueError(f"{place}: {name!r} is also the name at {other}: give each another")
