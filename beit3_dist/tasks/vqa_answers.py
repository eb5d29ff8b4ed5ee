"""Answers of VQA v2: their file, when two are the same, how right one is, and the scores that a model is trained on.

The rule is the benchmark's. Ten people answer a question. An answer is as right as the mean, over the ten, of
min(1, n / 3), where n is how many of the other nine gave it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from beit3_dist.data.text_files import read_lines, read_records, require_text

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""What is removed, or becomes a space; apostrophe and colon stay."""
PERIOD = re.compile(r"\.(?!\d)")
"""A period that no digit follows."""
DIGITS_COMMA = re.compile(r"\d,\d")
"""A comma inside a number."""
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
"""Number words and their digits."""
ARTICLES = ("a", "an", "the")
"""What is left out."""
SHORT_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
"""Short forms that are recognised with one of their apostrophes missing."""
APOSTROPHES = {
    form[:place] + form[place + 1 :]: form for form in SHORT_FORMS for place, letter in enumerate(form) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""How they are written then. The last entry is the benchmark's own slip, and counts."""

MARKS = {"\ufeff": "a byte order mark", "\0": "a zero byte", "\n": "a newline"}
"""What no name holds that a person has written."""
HIDDEN = re.compile(r"\.[^\W\d]|__MACOSX$")
"""`.DS_Store`, `.ipynb_checkpoints`, but not `.5`."""


def read_answers(path: Path) -> list[str]:
    """The answers (or names of classes) in the order of their labels: one a line, unilm's answer2label.txt of JSON
    lines, or a JSON array. Raises ValueError naming file and line where the list cannot be meant, see `check_names`."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    first = next((line for _, line in read_lines(path)), "")
    read = _by_label if first.startswith("{") else read_records if first.startswith("[") else _by_line
    names = list(read(path))
    if not names:
        raise ValueError(f"{path} holds no name")
    check_names(names)
    return [name for _, name in names]


def _by_line(path: Path) -> list[tuple[str, str]]:
    """Place and name of each line; empty ones at the end are none."""
    lines = list(read_lines(path))
    while lines and not lines[-1][1].strip():
        lines.pop()
    for number, name in lines:
        if not name.strip():
            raise ValueError(f"{path}, line {number} is empty: the names after it would get other labels")
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
        if label not in records:
            raise ValueError(f"{path}: there is no answer of label {label}, but of larger ones")
    return [records[label] for label in range(len(records))]


def check_names(names: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError at the first place whose name of an answer or class cannot be meant: one that is no text, holds
    a byte order mark, a newline or a zero byte, begins like a hidden file, or comes twice.

    An empty name is one of VQA v2's 3,129 answers (what people said was an article), so that it is refused only where
    nothing but an empty line says it.
    """
    places: dict[str, str] = {}
    for place, name in names:
        if not isinstance(name, str):
            raise ValueError(f"{place}: {name!r} is no text, which a name is")
        require_text(name, place)
        if found := next((mark for mark in MARKS if mark in name), ""):
            raise ValueError(f"{place}: the name {name!r} holds {MARKS[found]}, as no name does that is meant")
        if HIDDEN.match(name):
            raise ValueError(f"{place}: {name!r} is named like a hidden file, and no answer or class")
        if (other := places.setdefault(name.strip(), place)) != place:
            raise ValueError(f"{place}: {name!r} is also the name at {other}: give each another")


def normalised(answer: str) -> str:
    """The form in which answers are compared."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_number = DIGITS_COMMA.search(text) is not None
    plain = text
    for mark in PUNCTUATION:
        # Next to a space, or anywhere in an answer like "1,000", a mark goes; elsewhere it parts two words.
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or has_number else " ")
    words = (NUMBERS.get(word, word) for word in PERIOD.sub("", plain).lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How right a prediction is in [0, 1], by the answers of all people asked.

    All are normalised. (The benchmark's program leaves them as they are where everyone gave the same answer, which
    makes a difference only where that answer is not in its normal form.)
    """
    predicted = normalised(prediction)
    matches = [normalised(answer) == predicted for answer in answers]
    others = (sum(matches) - match for match in matches)
    return sum(min(1.0, count / 3) for count in others) / len(answers)


def soft_score(count: int) -> float:
    """The score of an answer that `count` of ten people gave: 0, 0.3, 0.6, 0.9, then 1; their mean accuracy."""
    return min(1.0, round(0.3 * count, 1))


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Normalised answers of ten people and their scores, in the order in which they were first given."""
    return {answer: soft_score(count) for answer, count in Counter(map(normalised, answers)).items()}
