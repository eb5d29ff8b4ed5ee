"""Files that come from elsewhere: what is no file is not waited for, and what they say is checked."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from beit3_dist.opening import (
    MOST_TEXT,
    MOST_YAML,
    inside,
    open_regular,
    parse_json,
    read_json,
    read_text,
    read_yaml,
    regular_size,
)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a socket's whole name has at most 108 bytes


NO_FILES: dict[str, Callable[[Path], None]] = {
    "FIFO": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "socket": make_socket,
}


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("read", [open_regular, regular_size, read_text, read_json, read_yaml])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_by_name(kind: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    with in_folder(tmp_path):
        NO_FILES[kind](tmp_path / "odd")
    with pytest.raises(OSError, match=f"not a regular file but a .*{kind}.*odd"):
        read(tmp_path / "odd")


@pytest.mark.parametrize("read", [open_regular, regular_size, read_text, read_json, read_yaml])
def test_a_name_that_no_file_has_is_told(read: Callable[[Path], object]) -> None:
    with pytest.raises(ValueError, match=r"'odd\\x00name' is no path of a file: embedded null byte"):
        read(Path("odd\0name"))


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "there").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("there")
    assert read_json(tmp_path / "link") == {"a": 1} and regular_size(tmp_path / "link") == 8


def test_a_small_file_is_small(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("0123456789")
    assert read_text(tmp_path / "a", 10) == "0123456789"
    os.truncate(tmp_path / "a", 1 << 40)  # a sparse file: nothing is on the disk
    for read, most in ((read_text, MOST_TEXT), (read_json, MOST_TEXT), (read_yaml, MOST_YAML)):
        with pytest.raises(ValueError, match=f"/a has {1 << 40} bytes; no such file has more than {most}"):
            read(tmp_path / "a")


NO_JSON = {
    "": "Expecting value",
    "[1]": "must hold a JSON object",
    "{": "Expecting property name",
    '{"a": 1, "a": 2}': "the field 'a' twice",
    '{"b": {"a": 1, "a": 2}}': "the field 'a' twice",
    '{"a": NaN}': "NaN, which is no number",
    '{"a": -Infinity}': "-Infinity, which is no number",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    '{"a": ' + "9" * 5000 + "}": "integer",
}


@pytest.mark.parametrize("text", NO_JSON, ids=[text[:25] for text in NO_JSON])
def test_json_is_what_it_is_defined_to_be(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"/a.json .*{NO_JSON[text]}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "a: [", "a: !!python/object:os.system {}", "a: \x01", "a: " + "9" * 5000]
    + ["[" * 250_000, "- " * 10_000, "a: &a [1]\nb: *a", "a: &a {x: 1}\nb: {<<: [*a, *a]}"],
    ids=lambda text: repr(text[:20]),
)
def test_yaml_is_a_mapping(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match="/a.yaml ") as refusal:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(refusal.value)


def test_text_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"/a\.json is no text in UTF-8 \(byte 7\)"):
        read_json(tmp_path / "a.json")


def test_numbers_as_they_are() -> None:
    assert parse_json('{"a": [1, 2.5, null, {"a": true}]}') == {"a": [1, 2.5, None, {"a": True}]}


@pytest.mark.parametrize("name", ["a.jpg", "b/a.jpg", "b/../a.jpg", "./a.jpg", "..a", "a..", "b//a", "~/a"])
def test_names_that_stay(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name) == tmp_path / name
    assert inside("pictures", name) == Path("pictures") / name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "b/../../a", "/etc/passwd", "b/..", "/", "a\0b"])
def test_names_that_leave(name: str, tmp_path: Path) -> None:
    for folder in (tmp_path, Path("pictures"), Path(".")):
        with pytest.raises(ValueError, match="leads out of"):
            inside(folder, name)


def test_a_whole_name_that_stays(tmp_path: Path) -> None:
    assert inside(tmp_path, f"{tmp_path}/a.jpg") == tmp_path / "a.jpg"
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path, f"{tmp_path}er/a.jpg")
