"""Tables of images and captions, and plain files of texts: what shards and tokenizers are made from.

Nothing is guessed: a row with more or fewer cells than its header, or a quote that is not closed, is refused by file
and line, since a caption would be cut, or belong to another image, without a word.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beit3_dist.config import require
from beit3_dist.data.compressed import bare
from beit3_dist.data.kinds import LeftOut, is_json, leave_out
from beit3_dist.data.text_files import read_large_json, read_lines, read_records, require_text

REMEDY = {",": 'quote a text that holds commas, as "a dog, running"', "\t": "take the tabs out of the text"}
"""Separator -> what makes one cell of two."""
LONGEST_CELL = 1 << 24
"""Characters (16 million) of a cell in a .csv table; csv's own limit is 131,072. A quote that nobody closes makes the
rest of the table one cell."""

LONGEST_SHOWN = 200
"""Characters of a header that a message shows."""


def texts_in(path: Path) -> Iterator[str]:
    """The documents of a file: lines of plain text, the field `text` of .jsonl or .json records, or the texts of a JSON
    array; empty ones are left out. Raises ValueError naming file and place."""
    require(path.is_file(), f"there is no file {path}")
    if not is_json(bare(path)):
        yield from filter(None, (line.strip() for _, line in read_lines(path)))
        return
    for place, record in read_records(path):
        text = _text(record.get("text") if isinstance(record, dict) else record, "text", place)
        if text.strip():
            yield text


def table_rows(table: Path, image: str, caption: str, rest: bool = False) -> Iterator[tuple[str, str]]:
    """Path and caption of each row of a .tsv, .csv, .jsonl or .json table, as written. `rest`: the caption is the last
    column, and cells beyond the header's belong to it. Raises ValueError with the place."""
    require(table.is_file(), f"there is no file {table}")
    if is_json(bare(table)):
        if rest:
            raise ValueError(f"{table}: its records name their fields, so that no caption has a rest")
        for place, record in read_records(table):
            known = record if isinstance(record, dict) else {}
            yield _text(known.get(image), image, place), _text(known.get(caption), caption, place)
        return
    separator, columns, rows = _cells(table)
    for column in (image, caption):
        if columns.count(column) != 1:
            raise ValueError(
                f"{table} has {'two columns' if column in columns else 'no column'} {column!r}; its columns are "
                f"{shown_columns(columns)}: name those of path and caption by --image and --caption"
            )
    if rest and columns[-1] != caption:
        raise ValueError(f"{table}: {caption!r} is not the last of its columns, which are {shown_columns(columns)}")
    for line, cells in rows:
        if rest and len(cells) > len(columns):
            cells[len(columns) - 1 :] = [separator.join(cells[len(columns) - 1 :])]
        if len(cells) != len(columns):
            wrong = _too_many_or_few(len(cells), len(columns), separator)
            too = ", or, if the caption comes last, give --rest-is-caption" if len(cells) > len(columns) else ""
            raise ValueError(f"{table}, line {line}: {wrong}{too}")
        yield cells[columns.index(image)], cells[columns.index(caption)]


def table_records(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields by their names of each row of a .tsv, .csv, .jsonl or .json table, as written. Raises ValueError
    with the place."""
    require(table.is_file(), f"there is no file {table}")
    if is_json(bare(table)):
        for place, record in read_records(table):
            require(isinstance(record, dict), f"{place}: no JSON object")
            yield place, record
        return
    separator, columns, rows = _cells(table)
    for column in columns:
        require(columns.count(column) == 1, f"{table} has two columns {column!r}: give each another name")
    for line, cells in rows:
        if len(cells) != len(columns):
            raise ValueError(f"{table}, line {line}: {_too_many_or_few(len(cells), len(columns), separator)}")
        yield f"{table}, line {line}", dict(zip(columns, cells, strict=True))


def _cells(table: Path) -> tuple[str, list[str], Iterator[tuple[int, list[str]]]]:
    """Separator and names of the columns of a .tsv or .csv table, and line and cells of each row."""
    separator = {".tsv": "\t", ".csv": ","}.get(Path(bare(table)).suffix.lower(), "")
    require(bool(separator), f"{table}: a table ends in .tsv, .csv, .jsonl or .json, and .gz or .zst")
    tabbed = ((number, line.split("\t")) for number, line in read_lines(table) if line)  # quotes are part of captions
    rows = _separated(table) if separator == "," else tabbed
    _, columns = next(rows, (1, []))
    require(bool(columns), f"{table} is empty: its first line names the columns")
    return separator, columns, rows


def coco_rows(path: Path, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """File name and caption of each annotation of COCO's captions_*.json, image by image in the order of the file. What
    belongs to no image, and images without a caption, are counted. Raises ValueError where the file is none."""
    require(path.is_file(), f"there is no file {path}")
    file = read_large_json(path)
    parts = [file.get(name) if isinstance(file, dict) else None for name in ("images", "annotations")]
    images, annotations = parts
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError(f"{path} is no file of COCO's: it has no lists 'images' and 'annotations'")
    captions: dict[Any, list[str]] = {}
    for image in images:
        fine = isinstance(image, dict) and isinstance(image.get("id"), (int, str)) and image.get("file_name")
        require(bool(fine) and isinstance(image["file_name"], str), f"{path}: an image has no id or no file_name")
        captions[image["id"]] = []
    for number, annotation in enumerate(annotations, start=1):
        place = f"{path}, annotation {number}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            raise ValueError(f"{place}: no caption: COCO's captions lie in captions_*.json")
        own = captions.get(annotation.get("image_id"))
        if own is None:
            leave_out(left_out, "annotations of no image", place)
        else:
            own.append(annotation["caption"])
    for image in images:
        if not captions[image["id"]]:
            leave_out(left_out, "images without a caption", image["file_name"])
        for caption in captions[image["id"]]:
            yield image["file_name"], caption


def shown_columns(columns: list[str]) -> str:
    """The names of a table's columns, of which there may be as many as cells where its lines end in another way."""
    names = ", ".join(columns)
    return names if len(names) <= LONGEST_SHOWN else f"{names[:LONGEST_SHOWN]!r}... (do its lines end with newlines?)"


def _too_many_or_few(cells: int, columns: int, separator: str) -> str:
    if cells < columns:
        return f"too few columns, {cells} for the header's {columns}"
    return f"too many columns, {cells} for the header's {columns}; {REMEDY[separator]}"


def _separated(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Line where it begins and cells of each row of a .csv table, in which quotes have a meaning."""
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader((f"{line}\n" for _, line in read_lines(table)), strict=True)
    while True:
        line = rows.line_num + 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{table}, line {line}: {error}; is a quote of this row not closed?") from None
        if cells is None:
            return
        if cells:
            yield line, cells


def _text(value: Any, field: str, place: str) -> str:
    """What a record has in a field, if it is a text. Raises ValueError."""
    require(isinstance(value, str), f"{place}: no string in the field {field!r}")
    require_text(value, place)
    return value
