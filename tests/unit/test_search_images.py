"""tools/search_images.py on small folders, with a tiny random model: order, index, page and sheet."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from beit3_dist.inference import Model
from beit3_dist.use import image_index
from tests.unit.test_inference import save, tokenizer  # noqa: F401  (a fixture)
from tools import search_images

WORDS = "a red circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:  # noqa: F811
    return save(tmp_path_factory.mktemp("models") / "retrieval", "retrieval", tokenizer)


def noise(path: Path, seed: int, size: tuple[int, int] = (24, 18)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def pictures_in(folder: Path, count: int) -> Path:
    for number in range(count):
        noise(folder / f"below {number % 3}" / f"{number}.png", number, (24 + number * 8, 300))
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures_in(tmp_path_factory.mktemp("pictures"), 40)


@pytest.fixture
def folder(forty: Path, tmp_path: Path) -> Path:
    """Forty pictures: a batch of 32 and one of 8."""
    return shutil.copytree(forty, tmp_path / "pictures")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return pictures_in(tmp_path / "pictures", 4)


def search(capsys: pytest.CaptureFixture[str], folder: Path, model: Path, *more: object) -> list[str]:
    """What is printed; page and index lie beside the folder."""
    place = ["--out", str(folder.parent / "page.html"), "--cache", str(folder.parent / "cache"), "--device", "cpu"]
    search_images.main([str(folder), WORDS, "--model", str(model), *place, *map(str, more)])
    return capsys.readouterr().out.splitlines()


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[Path] = []
        self.pictures: list[Image.Image] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if tag == "a":
            self.links.append(Path(unquote(urlsplit(values["href"]).path, errors="surrogateescape")))
        if tag == "img":
            kind, data = values["src"].split(",", 1)
            assert kind == "data:image/jpeg;base64"
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))
            assert self.pictures[-1].size == (int(values["width"]), int(values["height"]))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_best_are_found_in_order(capsys: pytest.CaptureFixture[str], folder: Path, model: Path) -> None:
    printed = search(capsys, folder, model, "--top", 7)
    network = Model.load(model, "cpu")
    files = sorted(folder.rglob("*.png"))
    scores = (network.embed_images(files) @ network.embed_texts([WORDS])[0]).tolist()
    ranked = sorted(zip(scores, files, strict=True), key=lambda match: -match[0])[:7]
    assert printed[:-1] == [f"{score:.3f}  {file.relative_to(folder)}" for score, file in ranked]
    assert "40 images, 40 of them newly read" in printed[-1]
    page = Page(folder.parent / "page.html")
    assert page.links == [file for _, file in ranked]
    assert WORDS in page.text and "the 7 best of 40 images" in page.text
    for small, (_, file) in zip(page.pictures, ranked, strict=True):
        with Image.open(file) as original:
            original.thumbnail((192, 192))
            assert small.size == original.size


def test_the_sheet_shows_them(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    """Plain colours are found again in the cells, in the order of the page."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in colours.items():
        Image.new("RGB", (300, 300), colour).save(folder / f"{name}.png")
    search(capsys, folder, model)
    sheet = Image.open(tmp_path / "page.png")
    side, margin, line = 192, 12, 18
    cell = side + 2 * margin
    assert sheet.size == (4 * cell, line + 2 * margin + cell + 2 * line)
    shown = [sheet.getpixel((number * cell + cell // 2, 2 * margin + line + cell // 2)) for number in range(4)]
    assert shown == [colours[link.stem] for link in Page(tmp_path / "page.html").links]


def test_a_second_search_reads_what_changed(
    capsys: pytest.CaptureFixture[str], folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(capsys, folder, model, "--top", 40)
    assert search(capsys, folder, model, "--top", 40)[:-1] == first[:-1]
    assert not list(folder.rglob("*.npz")), "nothing is written among the pictures"

    (folder / "below 0" / "0.png").unlink()
    noise(folder / "below 1" / "1.png", seed=99)
    noise(folder / "new.jpg", seed=100)
    third = search(capsys, folder, model, "--top", 41)
    assert "40 images, 2 of them newly read" in third[-1]
    for index in (folder.parent / "cache" / "search").glob("*.npz"):
        index.unlink()
    assert search(capsys, folder, model, "--top", 41)[:-1] == third[:-1], "as if there never was an index"


def test_an_interrupted_search_keeps_what_it_read(
    capsys: pytest.CaptureFixture[str], folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, calls = image_index.open_image, []

    def interrupted(path: Path):  # 40 images are a batch of 32 and one of 8
        calls.append(path)
        if len(calls) > 35:
            raise KeyboardInterrupt
        return opened(path)

    monkeypatch.setattr(image_index, "open_image", interrupted)
    with pytest.raises(SystemExit) as end:
        search(capsys, folder, model)
    assert end.value.code == 130 and capsys.readouterr().err.endswith("search_images.py: interrupted\n")
    monkeypatch.undo()
    assert "40 images, 8 of them newly read" in search(capsys, folder, model)[-1]


def test_a_damaged_index_is_made_anew(capsys: pytest.CaptureFixture[str], few: Path, model: Path) -> None:
    whole = search(capsys, few, model)
    (index,) = (few.parent / "cache" / "search").glob("*.npz")
    index.write_bytes(index.read_bytes()[:200])
    assert search(capsys, few, model)[:-1] == whole[:-1]


def index_in(folder: Path) -> Path:
    (file,) = (folder / "cache" / "search").glob("*.npz")
    return file


POISONS: dict[str, Callable[[dict[str, Any], np.ndarray], np.ndarray]] = {
    "a picture from elsewhere": lambda notes, v: [notes["seen"].append("../secret.png"), np.vstack([v, v[:1]])][1],
    "with its mark": lambda notes, v: [
        notes["seen"].append("../secret.png"),
        notes["files"].update({"../s.png": [1, 2]}),
        np.vstack([v, v[:1]]),
    ][2],
    "a picture that was not seen": lambda notes, v: [notes["seen"].pop(), v[:-1]][1],
    "vectors of another model": lambda notes, v: v[:, :-1],
    "more vectors": lambda notes, v: np.vstack([v, v]),
    "a vector of NaN": lambda notes, v: np.where(np.arange(len(v))[:, None] == 0, np.nan, v).astype(np.float32),
    "another type": lambda notes, v: v.astype(np.float64),
    "objects": lambda notes, v: np.array([{}] * len(v), dtype=object),
    "reasons that are numbers": lambda notes, v: [notes["unreadable"].update({"x.png": 3}), v][1],
    "sizes in words": lambda notes, v: [notes["files"].update({n: ["a", "b"] for n in notes["files"]}), v][1],
    "no names": lambda notes, v: [notes.pop("seen"), v][1],
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_index_is_made_anew(
    poison: str, packed: bool, capsys: pytest.CaptureFixture[str], few: Path, model: Path
) -> None:
    """What stands in an index is shown only where it is of the folder's pictures."""
    noise(few.parent / "secret.png", 9)
    right = search(capsys, few, model)[:-1]
    file = index_in(few.parent)
    with np.load(file) as content:
        notes, vectors = json.loads(content["notes"].tobytes()), content["vectors"]
    vectors = POISONS[poison](notes, vectors)
    marks = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
    (np.savez_compressed if packed else np.savez)(file, notes=marks, vectors=vectors)
    place = ["--out", str(few.parent / "page.html"), "--cache", str(few.parent / "cache"), "--device", "cpu"]
    search_images.main([str(few), WORDS, "--model", str(model), *place])
    shown = capsys.readouterr()
    said, left_out = shown.err.splitlines()
    assert f"{file} is damaged" in said and "notes.txt" in left_out
    assert shown.out.splitlines()[:-1] == right
    assert "secret" not in (few.parent / "page.html").read_text()


def test_unreadable_files_are_listed(
    capsys: pytest.CaptureFixture[str], folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    noise(folder / "cut.png", 1, (200, 200))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:5000])
    for _ in range(2):  # the second time from the index
        assert "40 images" in search(capsys, folder, model)[-1]
        text = Page(folder.parent / "page.html").text
        assert "2 files could not be read" in text
        assert "broken.jpg: undecodable image" in text and "cut.png: undecodable image" in text


def test_what_is_left_out_is_told(capsys: pytest.CaptureFixture[str], few: Path, model: Path) -> None:
    (few / "a\nb.psd").write_bytes(b"no picture")
    place = ["--out", str(few.parent / "page.html"), "--cache", str(few.parent / "cache"), "--device", "cpu"]
    for _ in range(2):
        search_images.main([str(few), WORDS, "--model", str(model), *place])
        assert capsys.readouterr().err == (
            "search_images.py: left out 1 files: extension .psd; the first is a?b.psd\n"
            "search_images.py: left out 1 files: extension .txt; the first is notes.txt\n"
        )


def test_names_are_only_names(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    """Markup, quotes, line ends, percent signs and bytes that are no UTF-8: shown as text, and the links work."""
    folder = tmp_path / "pictures"
    names = ['<script>alert("1")<', 'a" onload="x', "two\nlines", "100%20 & more", "\u202eright to left", "fältet"]
    for number, name in enumerate(names):
        noise(folder / f"{name}.png", number)
    os.rename(folder / f"{names[-1]}.png", os.fsencode(folder) + b"/f\xe4ltet.png")
    (folder / "<b>broken.png").write_bytes(b"")
    printed = search(capsys, folder, model)
    assert len(printed) == len(names) + 1
    page = Page(tmp_path / "page.html")
    assert "script" not in page.tags and "b" in page.tags and "\u202e" not in page.text
    assert sorted(map(os.fsencode, page.links)) == sorted(
        os.fsencode(path) for path in folder.iterdir() if "broken" not in path.name
    )
    assert '<script>alert("1")<.png' in page.text and "<b>broken.png" in page.text and "two?lines.png" in page.text


def test_links_are_followed_once(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "pictures"
    noise(folder / "a.JPG", 0)
    noise(folder / ".hidden" / "b.png", 1)
    noise(folder / ".c.png", 2)
    (folder / "round").symlink_to(folder)
    noise(tmp_path / "elsewhere" / "d.png", 3)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.png")
    assert "2 images" in search(capsys, folder, model)[-1]


def test_mistakes_are_one_line(tmp_path: Path, few: Path, model: Path, tokenizer: Path) -> None:  # noqa: F811
    empty, vqa = tmp_path / "empty", save(tmp_path / "vqa", "vqa", tokenizer)
    empty.mkdir()
    for arguments, named in (
        ((tmp_path / "none", WORDS, "--model", model), "none is no folder"),
        ((few, " ", "--model", model), "no words"),
        ((few, WORDS, "--model", tmp_path), "no model folder"),
        ((few, WORDS, "--model", vqa), "fine-tuned for vqa"),
        ((few, WORDS, "--model", model, "--top", 0), "--top 0"),
        ((few, WORDS, "--model", model, "--out", few / "page.html"), "nothing is written among the images"),
        ((few, WORDS, "--model", model, "--out", tmp_path / "page.pdf"), "page.pdf"),
        ((empty, WORDS, "--model", model), "no readable image"),
        ((few, WORDS, "--model", model, "--device", "cuda:99"), "the device cuda:99 cannot be used here: "),
        ((few, WORDS, "--model", model, "--device", "gpu"), "the device gpu cannot be used here: "),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            errors = io.StringIO()
            patch.setattr(sys, "stderr", errors)
            search_images.main([*map(str, arguments), "--cache", str(tmp_path / "cache")])
        assert end.value.code == 2, arguments
        assert named in errors.getvalue() and len(errors.getvalue().splitlines()) == 1, errors.getvalue()


@pytest.mark.slow
def test_as_a_program(folder: Path, model: Path) -> None:
    """Run from anywhere, it writes beside where it was started."""
    program = [sys.executable, search_images.__file__, folder, WORDS, "--model", model, "--cache", folder.parent / "c"]
    result = subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=folder.parent)
    left_out = "search_images.py: left out 1 files: extension .txt; the first is notes.txt\n"
    assert result.returncode == 0 and result.stderr == left_out, result.stderr
    assert len(result.stdout.splitlines()) == 25 and re.search(r"^matches\.html and matches\.png", result.stdout, re.M)
    assert (folder.parent / "matches.html").is_file() and (folder.parent / "matches.png").is_file()
