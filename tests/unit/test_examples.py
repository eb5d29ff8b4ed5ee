"""Indexes of downstream tasks are read in unilm's fields, and whatever is wrong in them is named before training."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from beit3_dist.tasks.data.examples import Example, Index, read_index
from beit3_dist.tasks.registry import task_class

RECORDS: dict[str, dict[str, Any]] = {
    "imagenet": {"image_path": "a/x.JPEG", "label": 3},
    "vqa": {"image_path": "a/y.jpg", "text_segment": [5, 6], "labels": [2, 7], "scores": [1.0, 0.3], "qid": 42},
    "nlvr2": {
        "image_path": "a/x.JPEG",
        "image2_path": "b/z.png",
        "text_segment": [8],
        "label": 1,
        "identifier": "dev-0-1",
    },
    "captioning": {"image_path": "b/z.png", "text_segment": [9, 9], "image_id": 11},
    "retrieval": {"image_path": "b/z.png", "text_segment": [9, 9], "image_id": 0},
    "text": {"text_segment": [4], "label": 0},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the pictures that RECORDS name, and with some things that are none."""
    for name in ("a/x.JPEG", "a/y.jpg", "b/z.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a picture")
    (tmp_path / "a" / "empty.jpg").touch()
    (tmp_path / "a" / "folder.jpg").mkdir()
    (tmp_path / "a" / "nowhere.jpg").symlink_to("missing.jpg")
    (tmp_path / "a" / "link.jpg").symlink_to("x.JPEG")
    return tmp_path


def write(root: Path, *lines: Any, name: str = "index.jsonl") -> Path:
    """An index of records, or of lines as they are."""
    path = root / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(root: Path, task: str, *lines: Any, **settings: Any) -> Index:
    """The index of such lines."""
    return read_index(write(root, *lines), task_class(task), root, **settings)


def test_every_task_is_read_in_the_released_fields(root: Path) -> None:
    x, y, z = root / "a/x.JPEG", root / "a/y.jpg", root / "b/z.png"
    expected = {
        "imagenet": Example(0, (x,), None, 3, "x.JPEG"),
        "vqa": Example(0, (y,), (5, 6), {2: 1.0, 7: 0.3}, "42"),
        "nlvr2": Example(0, (x, z), (8,), 1, "dev-0-1"),
        "captioning": Example(0, (z,), (9, 9), 11, "11"),
        "retrieval": Example(0, (z,), (9, 9), 0, "0"),
        "text": Example(0, (), (4,), 0, "0"),
    }
    for task, record in RECORDS.items():
        (example,) = read(root, task, record, train=True, vocab_size=10, classes=8)
        assert example == expected[task]


def test_examples_are_numbered_over_all_files_and_survive_pickling(root: Path) -> None:
    first = write(root, RECORDS["text"], "", RECORDS["text"] | {"label": 1}, name="first.jsonl")
    second = write(root, RECORDS["text"] | {"label": 2}, name="second.jsonl")
    index = read_index([first, second], task_class("text"), root)
    assert [(example.id, example.label) for example in index] == [(0, 0), (1, 1), (2, 2)]
    assert list(pickle.loads(pickle.dumps(index))) == list(index)
    with pytest.raises(IndexError):
        index[3]
    pickled = pickle.dumps(index)
    second.write_text(second.read_text() * 2)
    with pytest.raises(RuntimeError, match="second.jsonl changed"):
        pickle.loads(pickled)


def test_what_a_model_is_to_write_may_be_missing_in_evaluation_only(root: Path) -> None:
    caption = RECORDS["captioning"] | {"text_segment": None, "captions": ["a cat", "the cat"]}
    question = RECORDS["vqa"] | {"labels": [], "scores": [], "answers": ["yes"] * 10}
    assert read(root, "captioning", caption)[0].words is None
    assert read(root, "captioning", caption)[0].references == ("a cat", "the cat")
    assert read(root, "vqa", question)[0].label == {}
    assert read(root, "vqa", question)[0].references == ("yes",) * 10
    with pytest.raises(ValueError, match="text_segment"):
        read(root, "captioning", caption, train=True)
    with pytest.raises(ValueError, match="no answer to learn from"):
        read(root, "vqa", question, train=True)


FAULTS = [
    ("imagenet", "{", "not JSON"),
    ("imagenet", "[1]", "not a JSON object"),
    ("imagenet", {"label": 8}, r"label 8 is not in range\(8\)"),
    ("imagenet", {"label": True}, "no integer in the field 'label'"),
    ("imagenet", {"image_path": None}, "no string in the field 'image_path'"),
    ("imagenet", {"image_path": "a/missing.jpg"}, "there is no file .*a/missing.jpg"),
    ("imagenet", {"image_path": "nowhere/x.JPEG"}, "there is no file .*nowhere/x.JPEG"),
    ("imagenet", {"image_path": "a/nowhere.jpg"}, "there is no file .*a/nowhere.jpg"),
    ("imagenet", {"image_path": "a/empty.jpg"}, "an empty file: .*a/empty.jpg"),
    ("imagenet", {"image_path": "a/folder.jpg"}, "not a file: .*a/folder.jpg"),
    ("nlvr2", {"image2_path": "a/z.png"}, "there is no file .*a/z.png"),
    ("nlvr2", {"label": 2}, "label 2"),
    ("vqa", {"scores": [1.0]}, "two lists of one length"),
    ("vqa", {"labels": [2, 8]}, "label 8"),
    ("vqa", {"scores": [1.0, 3]}, "score"),
    ("vqa", {"text_segment": []}, "no list of token ids"),
    ("vqa", {"text_segment": ["what"]}, "no list of token ids"),
    ("text", {"text_segment": [10]}, r"range\(10\)"),
    ("retrieval", {"image_id": "0"}, "no integer in the field 'image_id'"),
]


@pytest.mark.parametrize(("task", "change", "reason"), FAULTS)
def test_a_faulty_line_is_named(root: Path, task: str, change: Any, reason: str) -> None:
    bad = change if isinstance(change, str) else RECORDS[task] | change
    with pytest.raises(ValueError, match=rf"index.jsonl, line 3: .*{reason}") as error:
        read(root, task, RECORDS[task], RECORDS[task], bad, vocab_size=10, classes=8)
    assert "\n" not in str(error.value)
    assert "1 faults in the 3 lines" in str(error.value)


def test_a_picture_may_be_a_link(root: Path) -> None:
    assert len(read(root, "imagenet", RECORDS["imagenet"] | {"image_path": "a/link.jpg"})) == 1


def test_all_faults_are_counted_and_the_first_named_in_order(root: Path) -> None:
    good, missing = RECORDS["imagenet"], RECORDS["imagenet"] | {"image_path": "a/no.jpg"}
    with pytest.raises(ValueError) as error:
        read(root, "imagenet", good, "{", *[missing] * 6, "", "{")
    message = str(error.value)
    assert "8 faults in the 9 lines" in message and "and 3 more" in message
    assert [message.index(f"line {number}:") for number in (2, 3, 4, 5, 6)] == sorted(
        message.index(f"line {number}:") for number in (2, 3, 4, 5, 6)
    )


def test_a_file_that_is_missing_or_empty_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="nothing.jsonl: cannot be read"):
        read_index(root / "nothing.jsonl", task_class("text"), root)
    for content in ("", "\n\n"):
        (root / "empty.jsonl").write_text(content)
        with pytest.raises(ValueError, match="it is empty"):
            read_index(root / "empty.jsonl", task_class("text"), root)


def test_many_lines_are_checked_in_little_time(root: Path) -> None:
    path = write(root, *[RECORDS["vqa"]] * 20_000)
    start = time.process_time()
    assert len(read_index(path, task_class("vqa"), root, train=True)) == 20_000
    assert time.process_time() - start < 5  # takes 0.3 s; a file that is looked up per line, or worse, shows


@pytest.mark.parametrize("task", ["imagenet", "retrieval", "captioning", "nlvr2", "vqa"])
@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "{0}/secret.jpg", "..", "a\0.jpg"])
def test_a_picture_outside_of_the_root_is_refused(name: str, task: str, root: Path) -> None:
    (root.parent / "secret.jpg").write_bytes(b"x")
    field = "image2_path" if task == "nlvr2" else "image_path"
    with pytest.raises(ValueError, match="1 faults in the .*index.jsonl, line 1: the name .* leads out of"):
        read(root, task, RECORDS[task] | {field: name.format(root.parent)})


def test_a_whole_name_inside_of_the_root_is_taken(root: Path) -> None:
    (example,) = read(root, "imagenet", RECORDS["imagenet"] | {"image_path": str(root / "a/x.JPEG")})
    assert example.images == (root / "a/x.JPEG",)


@pytest.mark.parametrize(
    ("task", "field"), [("vqa", "qid 42"), ("nlvr2", "identifier dev-0-1"), ("captioning", "image_id 11")]
)
def test_two_examples_of_one_prediction_are_refused(task: str, field: str, root: Path) -> None:
    first, second = write(root, RECORDS[task], name="a.jsonl"), write(root, "", RECORDS[task], name="b.jsonl")
    assert (
        len(read_index([first, second], task_class(task), root)) == 2
    )  # in training a question may come several times
    with pytest.raises(ValueError, match=rf"b.jsonl, line 2: {field} is also that of .*a.jsonl, line 1") as error:
        read_index([first, second], task_class(task), root, predicted=True)
    assert "\n" not in str(error.value)
    assert len(read_index([first], task_class(task), root, predicted=True)) == 1


def test_pictures_have_several_texts_in_retrieval(root: Path) -> None:
    file = write(root, RECORDS["retrieval"], RECORDS["retrieval"])
    assert len(read_index(file, task_class("retrieval"), root, predicted=True)) == 2


@pytest.mark.parametrize(
    ("task", "change"), [("captioning", {"captions": ["a \ud83d"]}), ("vqa", {"answers": ["\udc00"]})]
)
def test_half_a_surrogate_pair_in_references_is_named(task: str, change: dict, root: Path) -> None:
    field = next(iter(change))
    with pytest.raises(ValueError, match=rf"index.jsonl, line 1: the field '{field}': half a surrogate pair"):
        read(root, task, RECORDS[task] | change)
