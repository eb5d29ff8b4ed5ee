"""The examples of a downstream task: one line of a jsonl index each, checked before training starts.

An index stays in its file, mapped into memory, and a line is parsed when its example is asked for: a million examples
cost a million offsets, and loader processes share the rest.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beit3_dist.data.text_files import require_text
from beit3_dist.looking import of_node
from beit3_dist.opening import inside, open_regular

if TYPE_CHECKING:
    from beit3_dist.tasks.base import Task

PROBLEMS_SHOWN = 5
FOLDER_READERS = 16
"""Threads that list folders of images: they wait for storage most of the time."""

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TarMember:
    tar: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Example:
    """One example, before images are decoded."""

    id: int
    """Position in the index, from 0."""
    images: tuple[Path | TarMember, ...]
    """As many as the task has of each example."""
    words: tuple[int, ...] | None
    """Token ids without <s> and </s>; None where there is no text, or where the model is to write it."""
    label: Any
    """What the task learns from it, or tells it by: its class, {answer: score}, the image's number, ..."""
    name: str
    """What a submission calls it: question_id, image_id, identifier, or the image's file name."""
    references: tuple[str, ...] = ()
    """What people wrote, where the index has it: captions of the image, or answers to the question (fields `captions`
    and `answers`, which unilm's own indexes lack)."""


class Malformed(Exception):
    """A line does not describe an example of the task; the message is the reason."""


def integer(record: Record, field: str, end: int | None = None) -> int:
    """The integer in a field, in range(end) where an end is given. Raises Malformed, as the next two do."""
    value = record.get(field)
    if type(value) is not int:
        raise Malformed(f"no integer in the field {field!r}")
    if end is not None and not 0 <= value < end:
        raise Malformed(f"{field} {value} is not in range({end})")
    return value


def string(record: Record, field: str) -> str:
    """The string in a field, which a submission can hold."""
    value = _path(record, field)
    _require_characters(value, field)
    return value


def strings(record: Record, field: str) -> tuple[str, ...]:
    """The strings of a list; none where there is no such field."""
    value = record.get(field, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise Malformed(f"the field {field!r} is no list of strings")
    _require_characters(value, field)
    return tuple(value)


def _path(record: Record, field: str) -> str:
    """The string in a field; names of files may hold what is no character."""
    value = record.get(field)
    if not isinstance(value, str) or not value:
        raise Malformed(f"no string in the field {field!r}")
    return value


def _require_characters(value: str | list[str], field: str) -> None:
    """Raises Malformed for half a surrogate pair: no submission can hold it."""
    try:
        require_text(value, f"the field {field!r}")
    except ValueError as error:
        raise Malformed(str(error)) from None


@dataclass(frozen=True)
class Rules:
    """What an index is read by: root of its images, and the ends of what it may hold."""

    task: type[Task]
    """Whose index it is; loader processes find it by its module."""
    root: str
    train: bool
    """Whether a model is trained on it: then nothing that training needs may be missing."""
    vocab_size: int | None
    """End of the token ids, unchecked where None."""
    classes: int | None
    """Classes or answers, unchecked where None."""

    def paths(self, record: Record, *fields: str) -> tuple[Path, ...]:
        """The images that the fields name. An index may come from elsewhere: what it names lies in the root."""
        try:
            return tuple(inside(self.root, _path(record, field)) for field in fields)
        except ValueError as error:
            raise Malformed(str(error)) from None

    def words(self, record: Record, field: str = "text_segment") -> tuple[int, ...]:
        """The token ids of a field, at least one."""
        value = record.get(field)
        if not isinstance(value, list) or not value or not all(type(word) is int for word in value):
            raise Malformed(f"no list of token ids in the field {field!r}")
        if self.vocab_size is not None and not 0 <= min(value) <= max(value) < self.vocab_size:
            raise Malformed(f"a token id is not in range({self.vocab_size}), the model's vocabulary")
        return tuple(value)

    def parse(self, line: bytes, number: int) -> Example:
        """The example in a line, number `number` of the index. Raises Malformed."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise Malformed("not JSON in UTF-8") from None
        if not isinstance(record, dict):
            raise Malformed("not a JSON object")
        return self.task.read(number, record, self)


class Lines(Sequence[bytes]):
    """The lines of a file that are not empty, mapped; in another process it is opened anew."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if there is no such file, or no line in it."""
        self.path = path
        try:
            self._open()
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped.
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise ValueError(f"{path}: cannot be read as an index: {reason}") from None
        ends, starts, numbers, number = [], [], [], 0
        at = len(codecs.BOM_UTF8) if self.data[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8 else 0
        while at < len(self.data):
            end = self.data.find(b"\n", at)
            end = len(self.data) if end < 0 else end
            number += 1
            if self.data[at:end].strip():
                starts.append(at)
                ends.append(end)
                numbers.append(number)
            at = end + 1
        self.starts, self.ends, self.numbers = (np.array(places, dtype=np.int64) for places in (starts, ends, numbers))
        """Where each line starts and ends, and its number in the file, from 1."""
        if not starts:
            raise ValueError(f"{path}: cannot be read as an index: it is empty")

    def _open(self) -> None:
        with open_regular(self.path) as file:
            status = os.fstat(file.fileno())
            self.mark = (status.st_size, status.st_mtime_ns)
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, place: Any) -> Any:
        return self.data[self.starts[place] : self.ends[place]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "data"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()
        if self.mark != state["mark"]:
            raise RuntimeError(f"{self.path} changed since it was checked; start the run again")


class Index(Sequence[Example]):
    """The examples of one or several index files, in their order."""

    def __init__(self, files: Sequence[Lines], rules: Rules) -> None:
        self.files = list(files)
        self.rules = rules
        self.bounds = np.cumsum([len(file) for file in files])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, int | np.integer):
            raise TypeError(f"an index holds examples by number, not by {type(place).__name__}")
        if not 0 <= place < len(self):
            raise IndexError(f"there is no example {place} of {len(self)}")
        file, line = self._locate(int(place))
        return self.rules.parse(self.files[file][line], int(place))

    def place(self, id: int) -> str:
        file, line = self._locate(id)
        return f"{self.files[file].path}, line {self.files[file].numbers[line]}"

    def _locate(self, id: int) -> tuple[int, int]:
        """Number of an example's file, and its place among that file's lines."""
        file = int(np.searchsorted(self.bounds, id, side="right"))
        return file, id - (int(self.bounds[file - 1]) if file else 0)


def read_index(
    path: Path | Sequence[Path],
    task: type[Task],
    image_root: Path,
    *,
    train: bool = False,
    predicted: bool = False,
    vocab_size: int | None = None,
    classes: int | None = None,
) -> Index:
    """The examples of one or several jsonl files, in unilm/beit3's fields. Every line is checked, and that every
    image is a file with something in it.

    `image_root`: folder that the images' paths are relative to. `train`: every example needs what it is trained on (a
    caption, an answer). `predicted`: predictions are written, so that no two examples may be called the same.
    `vocab_size`, `classes`: ends of the token ids and of the classes or answers.

    Raises ValueError with one line that counts all faulty lines and names the first by file and number.
    """
    paths = [path] if isinstance(path, str | Path) else path
    rules = Rules(task, str(image_root), train, vocab_size, classes)
    index = Index([Lines(Path(one)) for one in paths], rules)
    of_node(lambda: _check(index, predicted))
    return index


def _check(index: Index, predicted: bool) -> None:
    """Raises ValueError as `read_index` does. One process does it for its node: it looks at every image."""
    task = index.rules.task
    malformed: dict[int, str] = {}
    needed: dict[str, set[str]] = defaultdict(set)
    called = task.one_prediction if predicted else None
    first: dict[str, int] = {}
    for id in range(len(index)):
        try:
            example = index[id]
        except Malformed as error:
            malformed[id] = str(error)
            continue
        if called and first.setdefault(example.name, id) != id:
            malformed[id] = f"{called} {example.name} is also that of {index.place(first[example.name])}"
            continue
        for image in task.files(example):
            folder, name = os.path.split(image)
            needed[folder].add(name)
    problems = [f"{index.place(id)}: {problem}" for id, problem in _in_order(index, malformed, missing_files(needed))]
    if problems:
        lines = f"{len(index)} lines of the {task.name} index"
        raise ValueError(f"{len(problems)} faults in the {lines}: {first_of(problems)}")


def first_of(faults: Sequence[str]) -> str:
    """The first faults, and how many more there are."""
    more = f"; and {len(faults) - PROBLEMS_SHOWN} more" if len(faults) > PROBLEMS_SHOWN else ""
    return "; ".join(faults[:PROBLEMS_SHOWN]) + more


def missing_files(needed: Mapping[str, set[str]]) -> dict[str, str]:
    """Path -> what is wrong with it, of the needed names of each folder. A folder is listed once, whatever it holds."""

    def faults(folder: str) -> dict[str, str]:
        wanted = needed[folder]
        try:
            with os.scandir(folder or ".") as entries:
                found = {entry.name: _fault(entry) for entry in entries if entry.name in wanted}
        except OSError:
            found = {}
        reasons = {os.path.join(folder, name): found.get(name, "there is no file") for name in wanted}
        return {path: reason for path, reason in reasons.items() if reason}

    with ThreadPoolExecutor(FOLDER_READERS) as pool:
        return {path: reason for some in pool.map(faults, needed) for path, reason in some.items()}


def _fault(entry: os.DirEntry[str]) -> str:
    """Why an entry of a folder can be no image; empty if it may be one, which its content is not asked for."""
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere
        return "there is no file"
    if not stat.S_ISREG(status.st_mode):
        return "not a file:"
    return "" if status.st_size else "an empty file:"


def _in_order(index: Index, malformed: Mapping[int, str], faults: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """All faults by the number of their line in the index: one per malformed line or image that cannot be one."""
    if not malformed and not faults:
        return
    for id in range(len(index)):
        if id in malformed:
            yield id, malformed[id]
            continue
        yield from (
            (id, f"{faults[str(image)]} {image}") for image in index.rules.task.files(index[id]) if str(image) in faults
        )
