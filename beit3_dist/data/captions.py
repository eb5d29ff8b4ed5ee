"""The captions of a pair: the lines of its .txt member, or fields of its .json member."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any, NamedTuple

import numpy as np

from beit3_dist.config import CaptionField, CaptionKey, caption_fields
from beit3_dist.data.faults import BadSample, check_size
from beit3_dist.data.kinds import JSON, TXT
from beit3_dist.data.reader import ShardReader
from beit3_dist.opening import one_line, without_mark

LARGEST_CAPTION = 1 << 22
"""Bytes of the largest member with captions that is read (4 MiB)."""
LONGEST_FAILURE = 200
"""Letters of what is told of a failed download."""


Fields = str | list[CaptionField]
"""What `fields_of` makes of a CaptionKey."""


def fields_of(key: CaptionKey) -> Fields:
    """What is read of every sample's .json member, told once."""
    return key if isinstance(key, str) else caption_fields(key, "data.caption_key")


class Captions(NamedTuple):
    """At least one caption."""

    texts: list[str]
    weights: list[float] | None = None
    """Of each, relative to the others; None: all alike."""

    @property
    def first(self) -> str:
        return self.texts[0]

    def drawn(self, generator: np.random.Generator) -> str:
        """One of them."""
        if self.weights is None:
            return self.texts[int(generator.integers(len(self.texts)))]
        ends = np.cumsum(self.weights)
        place = np.searchsorted(ends[:-1], generator.random() * ends[-1], side="right")
        return self.texts[int(place)]


def json_first(key: CaptionKey | Fields) -> bool:
    """Whether the .json member goes before the .txt: where a list of fields asks for what the .txt cannot tell."""
    return not isinstance(key, str)


def written_as(members: Container[int], key: Fields) -> int | None:
    """The kind of the member with a sample's captions; None where it has none."""
    kinds = (JSON, TXT) if json_first(key) else (TXT, JSON)
    return next((kind for kind in kinds if kind in members), None)


def read_captions(row: np.ndarray, reader: ShardReader, key: Fields) -> Captions:
    """The captions of a pair in a table's row. Raises BadSample."""
    check_size("a caption", int(row["text"][1]), LARGEST_CAPTION)
    return captions_of(reader.read(int(row["shard"]), *map(int, row["text"])), int(row["kind"]), key)


def captions_of(data: bytes, kind: int, key: Fields) -> Captions:
    """The captions of a .txt or .json member. Raises BadSample where there is none."""
    if kind == TXT:
        captions = Captions(_lines(data))
    else:
        record = _record(data)
        if failure := _failure(record):
            raise BadSample(failure)
        captions = _in_fields(record, key)
    if not captions.texts:
        raise BadSample("empty caption")
    return captions


def failed_download(data: bytes) -> str:
    """What a .json member says of a sample that img2dataset could not get; empty where it says no such thing."""
    try:
        return _failure(_record(data))
    except BadSample:
        return ""


def _failure(record: dict[str, Any]) -> str:
    """The same of its content, in which img2dataset (writer.py, downloader.py) writes `status`, success or
    failed_to_download or failed_to_resize, and `error_message`."""
    status = record.get("status")
    if not isinstance(status, str) or status == "success" or "error_message" not in record:
        return ""
    return one_line(f"status {status}: {record['error_message']}", LONGEST_FAILURE)


def _lines(data: bytes) -> list[str]:
    """Captions of a .txt member: its lines that are not empty."""
    try:
        text = without_mark(data).decode("utf-8")
    except UnicodeDecodeError:
        raise BadSample("invalid UTF-8 in the caption") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def _record(data: bytes) -> dict[str, Any]:
    """The object of a .json member; empty where it holds something else."""
    try:
        record = json.loads(without_mark(data).decode("utf-8"))
    except UnicodeDecodeError:
        raise BadSample("invalid UTF-8 in the caption") from None
    except (ValueError, RecursionError):
        raise BadSample("malformed JSON") from None
    return record if isinstance(record, dict) else {}


def _in_fields(record: dict[str, Any], fields: Fields) -> Captions:
    """Captions of a .json member: of one field, or of those of several that it has, where null is as none."""
    if isinstance(fields, str):
        return Captions(_in_field(record, fields))
    texts, weights = [], []
    present = [field for field in fields if record.get(field.field) is not None]
    if not present:
        raise BadSample(f"none of the fields {', '.join(repr(field.field) for field in fields)}")
    for field in present:
        captions = _in_field(record, field.field)
        texts += captions
        weights += [field.weight / max(1, len(captions))] * len(captions)
    return Captions(texts, weights)


def _in_field(record: dict[str, Any], field: str) -> list[str]:
    """A string, or a list of strings, without empty ones."""
    captions = record.get(field)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSample(f"no field {field!r} that is a string or a list of strings")
    try:
        "".join(captions).encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half a surrogate pair, which is no character.
        raise BadSample("invalid UTF-8 in the caption") from None
    return [caption.strip() for caption in captions if caption.strip()]
