"""A list of answers or classes is refused where it cannot be meant: labels would silently be others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from beit3_dist.tasks.data.names import read_names


def lines(*names: object) -> str:
    return "".join(f"{name}\n" for name in names)


def records(*names: object) -> str:
    return lines(*(json.dumps({"answer": name, "label": number}) for number, name in enumerate(names)))


REFUSED = {
    "an empty name": (lines("yes", "", "no"), "line 2 is empty: the names after it would get other labels"),
    "an empty first name": (lines("", "yes", "no"), "line 1 is empty"),
    "a blank name": (lines("yes", " \t", "no"), "line 2 is empty"),
    "a name twice": (lines("yes", "no", "yes"), "line 3: 'yes' is also the name at .*line 1"),
    "a name twice but for spaces": (lines("yes", "no", "yes "), "line 3: 'yes ' is also the name at .*line 1"),
    "a hidden file": (lines(".DS_Store", "cat"), "line 1: '.DS_Store' is named like a hidden file"),
    "a hidden folder": (lines("cat", ".ipynb_checkpoints"), "line 2: '.ipynb_checkpoints' is named like a hidden"),
    "a folder of a Mac": (lines("__MACOSX", "cat"), "line 1: '__MACOSX' is named like a hidden"),
    "attributes of a Mac": (lines("._cat", "cat"), "line 1: '._cat' is named like a hidden"),
    "a mark inside": (lines("yes", "\ufeffno"), r"line 2: the name '\\ufeffno' holds a byte order mark"),
    "a second mark": (lines("\ufeff\ufeffyes", "no"), r"line 1: the name '\\ufeffyes' holds a byte order mark"),
    "UTF-16 without a mark": ("yes\nno\n".encode("utf-16-le").decode(), "line 1: the name .* holds a zero byte"),
    "records: twice": (records("yes", "no", "yes"), "line 3: 'yes' is also the name at .*line 1"),
    "records: hidden": (records("yes", ".DS_Store"), "line 2: '.DS_Store' is named like"),
    "records: a newline": (records("yes", "n\no"), r"line 2: the name 'n\\no' holds a newline"),
    "records: a mark": (records("yes", "\ufeff"), "line 2: the name .* holds a byte order mark"),
    "records: a number": (records("yes", 2), "line 2: 2 is no text"),
    "records: nothing": (records("yes", None), "line 2: None is no text"),
    "a label twice": ('{"answer": "a", "label": 0}\n' * 2, "line 2: label 0 is also that of .*line 1"),
    "a label missing": ('{"answer": "a", "label": 0}\n{"answer": "b", "label": 2}', "there is no answer of label 1"),
    "a label of words": ('{"answer": "a", "label": "0"}', "line 1: no answer, or no label that is an integer"),
    "a label true": ('{"answer": "a", "label": true}', "line 1: no answer, or no label that is an integer"),
    "an answer missing": ('{"label": 0}', "line 1: no answer, or no label that is an integer"),
    "a map": ('{"yes": 0, "no": 1}', "line 1: no answer, or no label that is an integer"),
    "a map of many lines": ('{\n"yes": 0,\n"no": 1\n}', "line 1: not JSON"),
    "nothing": ("", " holds no name"),
    "empty lines": ("\ufeff\n\n", " holds no name"),
    "an empty array": ("[]", " holds no name"),
    "an array: twice": ('["yes", "no", "yes"]', "element 3: 'yes' is also the name at .*element 1"),
    "an array: hidden": ('[".DS_Store", "no"]', "element 1: '.DS_Store' is named like"),
    "an array of arrays": ('[["n01440764", "tench"]]', r"element 1: \['n01440764', 'tench'\] is no text"),
    "an array that is cut": ('["yes",\n"no",', "not JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(case: str, tmp_path: Path) -> None:
    content, reason = REFUSED[case]
    (tmp_path / "names.txt").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"names.txt.*{reason}") as error:
        read_names(tmp_path / "names.txt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (lines("yes", ".5", "1.50", "at&t", "{", "t-shirt "), ["yes", ".5", "1.50", "at&t", "{", "t-shirt "]),
        (records("", "a"), ["", "a"]),  # VQA v2's 3,129 answers have an empty one: what people said was an article
        ('["", "woods"]', ["", "woods"]),
        ('{"answer": "b", "label": 1}\n\n{"answer": "a", "label": 0, "count": 9}\n', ["a", "b"]),
        ("yes\nno\n\n \n", ["yes", "no"]),
    ],
)
def test_what_can_be_meant_is_read(content: str, names: list[str], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(content)
    assert read_names(tmp_path / "names.txt") == names
