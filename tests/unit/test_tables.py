"""Tables and files of texts: a row holds what its header says, and an array is an array."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from beit3_dist.data import compressed
from beit3_dist.data.tables import table_rows, texts_in


def read(path: Path, content: str, rest: bool = False) -> list[tuple[str, str]]:
    path.write_text(content)
    return list(table_rows(path, "image", "caption", rest))


REFUSED = [
    ("a.csv", "image,caption\np0.jpg,a cat\np1.jpg,a dog, running\n", "line 3: too many columns, 3 for .* 2; quote"),
    ("a.CSV", "image,caption\np0.jpg,a dog,\n", "line 2: too many columns, 3 for the header's 2"),
    ("a.csv", 'image,caption\np0.jpg,"a\ncat"\np1.jpg,a dog, running\n', "line 4: too many columns"),
    ("a.tsv", "image\tcaption\np0.jpg\ta dog\trunning\n", "line 2: too many columns, 3 for .* 2; take"),
    ("a.csv", "caption,image\na dog, running,p0.jpg\n", "line 2: too many columns, 3"),
    ("a.csv", "image,caption,id\np0.jpg,a dog\n", "line 2: too few columns, 2 for the header's 3"),
    ("a.tsv", "image\tcaption\np0.jpg\n", "line 2: too few columns, 1 for the header's 2"),
    ("a.csv", 'image,caption\np0.jpg,"a dog\np1.jpg,a cat\n', "line 2: unexpected end of data; is a quote of"),
    ("a.csv", 'image,caption\np0.jpg,"a dog" runs\n', "line 2: ',' expected after '\"'"),
    ("a.csv", "image,caption,caption\n", "has two columns 'caption'; its columns are image, caption, caption"),
    ("a.csv", "", " is empty: its first line"),
    ("a.tsv", "", " is empty: its first line"),
    ("a.tsv", "image\tcaption\r" + "p0.jpg\ta dog\r" * 999, r"no column 'caption'.{,300}do its lines end with newl"),
    ("a.jsonl", '{"image": "a.png", "caption": ["a", "b"]}', "line 1: no string in the field 'caption'"),
    ("a.json", '[{"image": "a.png", "caption": "a"}, {"image": "b.png"}]', "element 2: no string in the field"),
]


@pytest.mark.parametrize(("name", "content", "reason"), REFUSED)
def test_a_row_that_is_not_as_its_header_says_is_refused(name: str, content: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{reason}") as error:
        read(tmp_path / name, content)
    assert "\n" not in str(error.value)


def test_the_rest_is_the_caption_where_the_user_says_so(tmp_path: Path) -> None:
    rows = 'id,image,caption\n1,a.png,a dog, running on grass\n2,b.png,"a cat, asleep"\n3,c.png,one\n'
    expected = [("a.png", "a dog, running on grass"), ("b.png", "a cat, asleep"), ("c.png", "one")]
    assert read(tmp_path / "a.csv", rows, rest=True) == expected
    tabs = "image\tcaption\na.png\ta\tb\t\n"
    assert read(tmp_path / "a.tsv", tabs, rest=True) == [("a.png", "a\tb\t")]
    with pytest.raises(ValueError, match="'caption' is not the last of its columns, which are caption, image"):
        read(tmp_path / "a.csv", "caption,image\na dog, running,p0.jpg\n", rest=True)
    with pytest.raises(ValueError, match="line 2: too few columns"):
        read(tmp_path / "a.csv", "image,caption\na.png\n", rest=True)
    with pytest.raises(ValueError, match="name their fields"):
        read(tmp_path / "a.jsonl", "{}", rest=True)


def test_a_caption_may_be_long(tmp_path: Path) -> None:
    long = "word " * 100_000
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        content = f"image{separator}caption\na.png{separator}{long}\n"
        assert read(tmp_path / name, content) == [("a.png", long)]


def test_quotes_have_a_meaning_in_csv_alone(tmp_path: Path) -> None:
    assert read(tmp_path / "a.tsv", 'image\tcaption\n\na.png\t"a" dog\n') == [("a.png", '"a" dog')]
    with open(tmp_path / "b.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), ("a.png", 'one, "two"\nand\r\nthree')])
    assert read(tmp_path / "a.csv", (tmp_path / "b.csv").read_bytes().decode()) == [("a.png", 'one, "two"\nand\nthree')]


def test_records_may_be_an_array(tmp_path: Path) -> None:
    records = [{"image": "a.png", "caption": "one"}, {"image": "b.png", "caption": "two"}]
    for name in ("a.json", "a.jsonl"):
        assert read(tmp_path / name, json.dumps(records, indent=1)) == [("a.png", "one"), ("b.png", "two")]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    assert read(tmp_path / "a.json", lines) == [("a.png", "one"), ("b.png", "two")]


@pytest.mark.parametrize("texts", [[{"text": "one"}, {"text": " "}, {"text": "two"}], ["one", "", "two"]])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.jsonl"])
def test_an_array_of_texts_is_read_as_one(texts: list, indent: int | None, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(texts, indent=indent))
    assert list(texts_in(tmp_path / name)) == ["one", "two"]


@pytest.mark.parametrize("content", ['["one", 2]', '[{"text": "one"}, {"id": 2}]', '["one", ["two"]]'])
def test_what_is_no_text_in_an_array_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json, element 2: no string in the field 'text'"):
        list(texts_in(tmp_path / "a.json"))


def test_brackets_in_a_plain_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("[1] a reference\n[\n")
    assert list(texts_in(tmp_path / "a.txt")) == ["[1] a reference", "["]


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("end", PACKERS)
def test_compressed_texts_and_tables(end: str, tmp_path: Path) -> None:
    """They are read like those that they hold, also where several are joined, and a cut one is named."""
    pack = PACKERS[end]
    texts = [f"caf\u00e9 number {number}" for number in range(20_000)]
    contents = {
        "a.txt": "\n".join(texts),
        "a.jsonl": "\n".join(json.dumps({"text": text}) for text in texts),
        "a.json": json.dumps(texts),
        "A.JSON": json.dumps([{"text": text} for text in texts]),
    }
    for name, content in contents.items():
        data = content.encode()
        path = tmp_path / f"{name}{end}"
        path.write_bytes(pack(data[:1000]) + pack(data[1000:]))
        assert list(texts_in(path)) == texts, name
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=f"{name}{end}.*(is damaged|the archive is cut)"):
            list(texts_in(path))
    table = tmp_path / f"pairs.tsv{end}"
    table.write_bytes(pack(b"image\tcaption\na.png\ta dog\n"))
    assert list(table_rows(table, "image", "caption")) == [("a.png", "a dog")]
    table.write_bytes(b"image\tcaption\na.png\ta dog\n")
    with pytest.raises(ValueError, match=f"pairs.tsv{end} is damaged: "):
        list(table_rows(table, "image", "caption"))
    (tmp_path / f"a.tar{end}").write_bytes(pack(bytes(1024)))
    with pytest.raises(ValueError, match=f"a.tar{end} is a compressed tar, and no text"):
        list(texts_in(tmp_path / f"a.tar{end}"))


@pytest.mark.parametrize("end", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_texts_that_are_made_to_fill_memory(
    name: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "FREE", 1 << 20)
    path = tmp_path / f"{name}{end}"
    path.write_bytes(PACKERS[end]((b"[" if name == "a.json" else b"") + b"\n" * (30 << 20)))
    with pytest.raises(ValueError, match=f"{name}{end} unpacks to more than 200 times its size"):
        list(texts_in(path))


def test_zstd_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a .zst file needs zstandard, .*pip install -e '.\[data\]' brings it"):
        list(texts_in(tmp_path / "a.txt.zst"))
