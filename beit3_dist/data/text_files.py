"""Text that comes from elsewhere, by lines and by records: UTF-8, without a byte order mark, cut at newlines alone.

A line ends with "\\n" or "\\r\\n". What else `str.splitlines` cuts at (U+2028, U+0085, a form feed, ...) is part of a
line: where labels are numbers of lines, one cut too many makes all later ones mean other names, and nothing tells.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from beit3_dist.data.compressed import bare, open_unpacked
from beit3_dist.data.faults import BadSample, check_size
from beit3_dist.data.lines import LONGEST_LINE, lines_of
from beit3_dist.opening import blaming, read_text, text_of, without_mark

_ARRAY = re.compile(rb"\s*\[")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SHOWN = 20
"""Characters before half a surrogate pair that an error shows."""


def unmarked(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text, with their ends, without the mark before the first."""
    for number, line in enumerate(lines):
        yield line if number else without_mark(line)


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line of a file, compressed or not. Raises ValueError naming file and line."""
    with open_unpacked(path) as file:
        for number, line in enumerate(unmarked(lines_of(file.readline)), start=1):
            try:
                check_size("a line", len(line), LONGEST_LINE)
                text = text_of(line.removesuffix(b"\n").removesuffix(b"\r"))
            except (BadSample, ValueError) as error:
                raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from None
            yield number, text


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Place and content of each record of a file of JSON lines, empty ones left out, or of one JSON array. Raises
    ValueError naming file and place."""
    with open_unpacked(path) as file:
        is_array = _ARRAY.match(without_mark(file.read(1 << 10))) is not None
    if is_array:
        for number, record in enumerate(read_large_json(path), start=1):
            yield f"{os.fspath(path)}, element {number}", record
        return
    for number, line in read_lines(path):
        if line.strip():
            place = f"{os.fspath(path)}, line {number}"
            yield place, _json_in(line, place)


def read_large_json(path: str | os.PathLike[str]) -> Any:
    """What one JSON text of any size holds. Raises ValueError naming the file."""
    text = _whole(path)
    content = _json_in(text, os.fspath(path))
    if _ESCAPED_SURROGATE.search(text):
        require_text(content, os.fspath(path))
    return content


def _whole(path: str | os.PathLike[str]) -> str:
    if bare(path) == os.fspath(path):
        return read_text(path, most=sys.maxsize)
    with open_unpacked(path) as file, blaming(os.fspath(path)):
        return text_of(without_mark(file.read()))


def _json_in(text: str, place: str) -> Any:
    """What a JSON text holds. Raises ValueError naming the place."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{place}: not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"{place}: not JSON: {error.msg} at {line}column {error.colno}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{place}: not JSON: {error}") from None


def require_text(content: Any, place: str) -> None:
    """Raises ValueError where a string in what JSON held has half a surrogate pair: JSON can escape it, but it is no
    character, and no file in UTF-8 can hold it."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        before = error.object[max(0, error.start - SHOWN) : error.start]
        raise ValueError(f"{place}: half a surrogate pair, which is no character, after {before!r}") from None
