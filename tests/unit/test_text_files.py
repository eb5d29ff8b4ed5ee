"""Text is read alike wherever it comes in: without a byte order mark, cut at newlines alone, faults named by line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit3_dist.command_line import parse
from beit3_dist.config import RunConfig
from beit3_dist.data.captions import captions_of
from beit3_dist.data.faults import BadSample
from beit3_dist.data.kinds import JSON, TXT
from beit3_dist.data.tables import table_rows, texts_in
from beit3_dist.data.text import documents
from beit3_dist.data.text_files import read_lines, read_records
from beit3_dist.opening import read_json, read_yaml
from beit3_dist.parallel.deepspeed_config import read_deepspeed_file
from beit3_dist.reports import opened
from beit3_dist.tasks.data import benchmarks
from beit3_dist.tasks.data.class_shards import read_class_shards
from beit3_dist.tasks.data.examples import read_index
from beit3_dist.tasks.data.names import read_names
from beit3_dist.tasks.registry import task_class
from tests.unit.tar_fixtures import picture, write_tar
from tools import compare_tasks, train_text_tokenizer, verify_order

MARK = b"\xef\xbb\xbf"
TEXTS = ["yes\u2028sir", "no\x85way", "red\x0bwine", "a\x0ccar", "b\x1cc\x1dd\x1ee", "the\u2029last"]
"""Each holds what str.splitlines takes for the end of a line."""

Lines = list[str]
Form = Callable[[list[str]], Lines]
"""Texts -> the lines of a file that holds them."""
Read = Callable[[Path], list[str]]


def as_array(texts: list[str]) -> Lines:
    return ["[", *(f"{json.dumps(text, ensure_ascii=False)}," for text in texts[:-1]), json.dumps(texts[-1]), "]"]


def records(field: str, **more: Any) -> Form:
    def form(texts: list[str]) -> Lines:
        return [json.dumps({field: text, **more, "label": n}, ensure_ascii=False) for n, text in enumerate(texts)]

    return form


def rows(separator: str) -> Form:
    return lambda texts: [f"image{separator}caption", *(f"{n}.png{separator}{text}" for n, text in enumerate(texts))]


def captions(path: Path) -> list[str]:
    return [caption for _, caption in table_rows(path, "image", "caption")]


def sentences(path: Path) -> list[str]:
    return list(train_text_tokenizer.sentences([str(path)]))


def of_member(jsonl: bool) -> Read:
    return lambda path: [str(text) for _, text in documents(io.BytesIO(path.read_bytes()), jsonl)]


def nlvr2(path: Path) -> list[str]:
    for other in ("train.json", "test1.json"):
        (path.parent / other).write_text("")
    return [line["text"] for line in benchmarks.nlvr2(path.parent)["nlvr2.dev.index.jsonl"]]


def nlvr2_lines(texts: list[str]) -> Lines:
    return [
        json.dumps({"sentence": text, "label": "True", "identifier": f"dev-{n}-0"}, ensure_ascii=False)
        for n, text in enumerate(texts)
    ]


def flickr_lines(texts: list[str]) -> Lines:
    images = [{"split": "test", "filename": "0.jpg", "sentences": [{"raw": text} for text in texts]}]
    return json.dumps({"images": images}, ensure_ascii=False, indent=1).split("\n")


def flickr30k(path: Path) -> list[str]:
    return [line["text"] for line in benchmarks.flickr30k(path)["flickr30k.test.jsonl"]]


def index_lines(texts: list[str]) -> Lines:
    fields = {"image_path": "0.png", "image2_path": "0.png", "text_segment": [5], "label": 1}
    return [json.dumps(fields | {"identifier": text}, ensure_ascii=False) for text in texts]


def index(path: Path) -> list[str]:
    (path.parent / "0.png").write_bytes(picture(0))
    return [example.name for example in read_index(path, task_class("nlvr2"), path.parent)]


READERS: dict[str, tuple[str, Form, Read]] = {
    "answers": ("answers.txt", lambda texts: texts, read_names),
    "unilm's answers": ("answer2label.txt", records("answer"), read_names),
    "classes in JSON": ("classes.json", as_array, read_names),
    "a table of commas": ("a.csv", rows(","), captions),
    "a table of tabs": ("a.tsv", rows("\t"), captions),
    "a table of records": ("a.jsonl", records("caption", image="a.png"), captions),
    "texts": ("a.txt", lambda texts: texts, lambda path: list(texts_in(path))),
    "records of texts": ("a.jsonl", records("text"), lambda path: list(texts_in(path))),
    "an array of texts": ("a.json", as_array, lambda path: list(texts_in(path))),
    "the tokenizer's texts": ("a.txt", lambda texts: texts, sentences),
    "the tokenizer's records": ("a.jsonl", records("text"), sentences),
    "the tokenizer's array": ("a.json", as_array, sentences),
    "a text member": ("a.txt", lambda texts: texts, of_member(jsonl=False)),
    "a member of records": ("a.jsonl", records("text"), of_member(jsonl=True)),
    "captions": ("a.txt", lambda texts: texts, lambda path: captions_of(path.read_bytes(), TXT, "").texts),
    "captions in JSON": (
        "a.json",
        lambda texts: json.dumps({"caption": texts}, indent=1).split("\n"),
        lambda path: captions_of(path.read_bytes(), JSON, "caption").texts,
    ),
    "NLVR2": ("dev.json", nlvr2_lines, nlvr2),
    "Karpathy's split": ("dataset_flickr30k.json", flickr_lines, flickr30k),
    "an index": ("index.jsonl", index_lines, index),
}
"""Place that reads text -> name of a file for it, what the file holds of some texts, and the texts as they are read."""


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> tuple[str, Form, Read]:
    return READERS[request.param]


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "marked"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("end", ["", "one", "two"])
def test_every_reader_cuts_at_newlines_alone(
    reader: tuple[str, Form, Read], mark: bytes, newline: str, end: str, tmp_path: Path
) -> None:
    name, form, read = reader
    empty = {"": "", "one": newline, "two": newline * 2}[end]  # an empty last line is none
    (tmp_path / name).write_bytes(mark + (newline.join(form(TEXTS)) + empty).encode())
    assert read(tmp_path / name) == TEXTS


FILES = [name for name in READERS if "member" not in name and "captions" not in name and name != "an index"]
"""Readers of whole files. What is wrong with members and lines of an index is collected, in messages of their own."""
OF_JSON = [name for name in FILES if READERS[name][0] not in ("answers.txt", "a.txt", "a.csv", "a.tsv")]


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_utf8_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    file, form, read = READERS[name]
    written = "\n".join(form(["one", "caf\u00e9", "three"])).encode()
    line = written.count(b"\n", 0, written.index(b"caf")) + 1
    for bad in (b"caf\xe9", b"caf\xed\xa0\x80"):  # Latin-1, and half a surrogate pair in bytes
        (tmp_path / file).write_bytes(written.replace("caf\u00e9".encode(), bad))
        with pytest.raises(ValueError, match=rf"{file}.*line {line}\b.*not UTF-8") as error:
            read(tmp_path / file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"\xff\xfe", "UTF-16"), (b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\3\4", "zip")],
)
def test_what_else_it_is_is_told(start: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(start + b"\x8b\xff\n\xff")
    with pytest.raises(ValueError, match=f"a.txt, line 1: not UTF-8 but .*{kind}"):
        list(texts_in(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", OF_JSON)
def test_half_a_surrogate_pair_is_named(name: str, tmp_path: Path) -> None:
    file, form, read = READERS[name]
    written = "\n".join(form(["one", "a dog XX", "three"]))
    (tmp_path / file).write_text(written.replace("XX", "\\ud83d"))
    with pytest.raises(ValueError, match=rf"{file}.*half a surrogate pair, which is no character, after .*a dog"):
        read(tmp_path / file)
    (tmp_path / file).write_text(written.replace("XX", "\\ud83d\\ude00"))
    assert read(tmp_path / file) == ["one", "a dog \U0001f600", "three"]


def test_half_a_surrogate_pair_in_an_index_and_in_members(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "index.jsonl").write_text("\n".join(index_lines(["one", "XX"])).replace("XX", "\\ud83d"))
    with pytest.raises(ValueError, match="index.jsonl, line 2: the field 'identifier': half a surrogate pair"):
        index(tmp_path / "index.jsonl")
    member = [*documents(io.BytesIO(MARK + b'{"text": "\\ud83d"}\n{"text": "two"}'), jsonl=True)]
    assert [(number, str(text)) for number, text in member] == [(1, "invalid UTF-8"), (2, "two")]
    with pytest.raises(BadSample, match="invalid UTF-8"):
        captions_of(b'{"caption": "\\ud83d"}', JSON, "caption")


def deepspeed_stage(path: Path) -> object:
    return read_deepspeed_file(str(path))["a"]


def recipe_seed(path: Path) -> object:
    shards = ["--data.images", "a.tar", "--data.texts", "b.tar", "--data.pairs", "c.tar"]
    files = ["--text_tokenizer", "t.spm", "--image_tokenizer", "i.pth", "--out", "out"]
    return parse(RunConfig, "test", "", ["--config", str(path), *shards, *files]).seed


def evaluation(path: Path) -> object:
    return compare_tasks.last_validation(path.parent)["a"]


SMALL: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "JSON": ("a.json", '{"a": 7}', lambda path: read_json(path)["a"]),
    "YAML": ("a.yaml", "a: 7", lambda path: read_yaml(path)["a"]),
    "a DeepSpeed file": ("ds.json", '{"a": 7}', deepspeed_stage),
    "a recipe": ("recipe.yaml", "seed: 7", recipe_seed),
    "a report's records": ("metrics.jsonl", '{"step": 7}\n', lambda path: opened.read_records(path)[0]["step"]),
    "records to verify": ("metrics.jsonl", '{"a": 7}\n', lambda path: verify_order.records(path)[0]["a"]),
    "validations to compare": ("eval.jsonl", '{"a": 1}\n{"a": 7}\n', evaluation),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_files_may_begin_with_a_mark(name: str, tmp_path: Path) -> None:
    file, content, read = SMALL[name]
    for mark in (b"", MARK):
        (tmp_path / file).write_bytes(mark + content.encode())
        assert read(tmp_path / file) == 7


def test_classes_in_tars_may_begin_with_a_mark(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "png": picture(0), "cls": MARK + b"3\r\n"}])
    (example,) = read_class_shards(str(tmp_path / "a.tar"), "data.train", str(tmp_path / "cache"), 4)
    assert example.label == 3


def test_lines_and_records_have_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(MARK + b'1\r\n\n{"a": 2}')
    assert list(read_lines(path)) == [(1, "1"), (2, ""), (3, '{"a": 2}')]
    assert list(read_records(path)) == [(f"{path}, line 1", 1), (f"{path}, line 3", {"a": 2})]
    path.write_bytes(MARK + b' \n[1,\n {"a": 2}]')
    assert list(read_records(path)) == [(f"{path}, element 1", 1), (f"{path}, element 2", {"a": 2})]
    for content in (b"", MARK):
        path.write_bytes(content)
        assert [text for _, text in read_lines(path) if text] == list(read_records(path)) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"a": 1}\n{"a": }', "line 2: not JSON: Expecting value at column 7"),
        ('{"a": 1}\n' + "[" * 100_000, "line 2: not JSON: nested too deeply"),
        ('{"a": 1}\n' + "9" * 5000, "line 2: not JSON: Exceeds the limit"),
        ('[\n{"a": 1},\n{"a": }]', ": not JSON: Expecting value at line 3, column 7"),
    ],
)
def test_what_is_no_json_is_named(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"a.jsonl.*{reason}"):
        list(read_records(tmp_path / "a.jsonl"))
