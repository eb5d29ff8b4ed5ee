"""One rule says which names count, for members of tars and files in folders alike."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from beit3_dist.data.kinds import (
    IMAGE,
    IMAGE_EXTENSIONS,
    JSONL,
    TXT,
    LeftOut,
    folders_in,
    hidden,
    images_below,
    images_in,
    is_tar,
    key_and_kind,
)
from beit3_dist.tasks.data.benchmarks import imagenet


@pytest.mark.parametrize("name", ["a.jpg", "./a.jpg", "../a.jpg", "x/y.z/a.jpg", "a._b.jpg", "MACOSX/a.jpg"])
def test_people_s_names(name: str) -> None:
    assert not hidden(name.encode())
    assert key_and_kind(name.encode()) == (name[:-4].encode(), IMAGE)


@pytest.mark.parametrize("name", ["._a.jpg", "x/._a.jpg", ".a.jpg", ".x/a.jpg", "x/.y/a.jpg", "__MACOSX/a.jpg"])
def test_a_system_s_names(name: str) -> None:
    assert hidden(name.encode()) and key_and_kind(name.encode())[1] is None


@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_extensions_in_any_case(change: type[str]) -> None:
    for extension in IMAGE_EXTENSIONS:
        assert key_and_kind(f"x.{change(extension)}".encode())[1] == IMAGE
    assert key_and_kind(change("x.txt").encode())[1] == TXT and key_and_kind(change("x.jsonl").encode())[1] == JSONL
    assert is_tar(change("x.tar")) and is_tar(change("x.tar.gz")) and is_tar(change("x.tgz"))
    assert not is_tar(change("tar")) and not is_tar(change("x.txt"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, other files, hidden ones, links and things that are no files."""
    names = ("b/1.JPG", "b/.2.jpg", "a/3.png", "a/notes.txt", ".git/4.png", "__MACOSX/5.png", "a/6.jfif", "7.heic")
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"content")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "8.gif").write_bytes(b"content")
    (tmp_path / "x" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x" / "d").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x" / "round").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "9.png").symlink_to("/nowhere")
    os.mkfifo(tmp_path / "x" / "10.png")
    (tmp_path / "x" / "11.png").mkdir()
    return tmp_path / "x"


def test_pictures_below_a_folder(folder: Path) -> None:
    left_out: LeftOut = {}
    found = [str(path.relative_to(folder)) for path in images_below(folder, left_out)]
    assert found == ["7.heic", "a/3.png", "a/6.jfif", "b/1.JPG", "c/8.gif"]
    assert left_out == {
        "not a regular file": (1, "10.png"),
        "No such file or directory": (1, "9.png"),
        "hidden": (3, ".git"),
        "extension .txt": (1, "a/notes.txt"),
    }


def test_names_in_one_folder(folder: Path) -> None:
    left_out: LeftOut = {}
    assert folders_in(folder, left_out) == ["11.png", "a", "b", "c", "d", "round"]
    assert left_out == {"hidden": (2, f"{folder}/.git"), "beside the folders": (3, f"{folder}/10.png")}
    left_out = {}
    assert images_in(folder, left_out) == ["7.heic"] and images_in(folder / "b", left_out) == ["1.JPG"]
    assert left_out == {
        "hidden": (3, f"{folder}/.git"),
        "not a regular file": (1, f"{folder}/10.png"),
        "a folder": (6, f"{folder}/11.png"),
        "No such file or directory": (1, f"{folder}/9.png"),
    }


def test_hidden_folders_shift_no_class(tmp_path: Path) -> None:
    """Folders of an editor or of a Mac sort before all classes: every label would be another."""
    for side in ("train", "val"):
        for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
            (tmp_path / side / name).mkdir(parents=True)
            for picture in ("1.JPEG", "._1.JPEG"):
                (tmp_path / side / name / picture).write_bytes(b"content")
    indexes, classes = imagenet(tmp_path, {})
    assert classes == ["cat", "dog"]
    assert [line["label"] for line in indexes["imagenet.train.index.jsonl"]] == [0, 1]
    assert [line["image_path"] for line in indexes["imagenet.val.index.jsonl"]] == ["val/cat/1.JPEG", "val/dog/1.JPEG"]
