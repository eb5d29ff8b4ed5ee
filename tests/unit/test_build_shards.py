"""Shards are built whole, the same every time, and hold what the folder, the table or the text holds."""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit3_dist.data.index import open_table
from beit3_dist.data.order import Stream
from beit3_dist.demo import sources as demo_sources
from tests.unit.tar_fixtures import exit_code
from tools import build_shards

TOOL = Path(build_shards.__file__)


def run(*arguments: object) -> int:
    """Exit code of the tool, in this process, with one worker."""
    parallel = ["--workers", "1"] if arguments[0] not in ("texts", "shards") and "--workers" not in arguments else []
    return exit_code(build_shards.main, [*map(str, arguments), *parallel])


def save(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    """Writes a picture of noise; returns the file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """Name and content of every member of a folder's tars, by tarfile, in their order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.append((member.name, file.read()))
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 40 PNGs, ten in each of four folders."""
    for number in range(40):
        save(tmp_path / "pictures" / f"{number % 4}" / f"{number:02d}.png", number)
    return tmp_path / "pictures"


def test_images_are_stored_as_they_are_on_either_side(pictures: Path, tmp_path: Path) -> None:
    assert run("images", pictures, tmp_path / "out", "--held-out", 0.3, "--per-shard", 7) == 0
    sides = {side: contents(tmp_path / "out" / side) for side in ("train", "held_out")}
    originals = sorted(path.read_bytes() for path in pictures.rglob("*.png"))
    assert sorted(data for members in sides.values() for _, data in members) == originals
    assert 0 < len(sides["held_out"]) < len(sides["train"])
    for members in sides.values():
        assert [name for name, _ in members] == [f"{number:09d}.png" for number in range(len(members))]
    assert len(list((tmp_path / "out" / "train").iterdir())) == -(-len(sides["train"]) // 7)


def test_two_builds_are_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    for out in ("first", "second"):
        assert run("images", pictures, tmp_path / out, "--held-out", 0.3) == 0
        time.sleep(1.1)  # A time of change in a header counts whole seconds.
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_workers_do_not_change_the_build(pictures: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        assert run("images", pictures, tmp_path / f"{workers}", "--workers", workers) == 0
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_a_sample_keeps_its_side_when_the_data_set_grows(pictures: Path, tmp_path: Path) -> None:
    assert run("images", pictures, tmp_path / "small", "--held-out", 0.3) == 0
    for number in range(20):
        save(pictures / f"0{number}.png", 100 + number)
    assert run("images", pictures, tmp_path / "large", "--held-out", 0.3) == 0
    for side in ("train", "held_out"):
        small, large = ({data for _, data in contents(tmp_path / size / side)} for size in ("small", "large"))
        assert small < large


def test_copies_of_a_picture_lie_on_the_same_side(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, pictures / "copies")
    assert run("images", pictures, tmp_path / "out", "--held-out", 0.5) == 0
    train, held_out = ({data for _, data in contents(tmp_path / "out" / side)} for side in ("train", "held_out"))
    assert not train & held_out
    assert len(train | held_out) == 40


def test_held_out_share_is_near_the_asked_one() -> None:
    share = sum(build_shards.side(str(number).encode(), 0.05) == "held_out" for number in range(20_000)) / 20_000
    assert abs(share - 0.05) < 5 * (0.05 * 0.95 / 20_000) ** 0.5  # Five standard deviations of a fair draw.
    assert build_shards.side(b"any", 0) == "train"


def test_summary_lists_counts_sizes_and_hashes(pictures: Path, tmp_path: Path) -> None:
    assert run("images", pictures, tmp_path / "out", "--held-out", 0.3, "--per-shard", 7) == 0
    shards = json.loads((tmp_path / "out" / "shards.json").read_text())["shards"]
    assert sum(shard["samples"] for shard in shards) == 40
    on_disk = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.tar")}
    assert {shard["file"] for shard in shards} == on_disk
    for shard in shards:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_size_scales_down_only(tmp_path: Path) -> None:
    small = save(tmp_path / "in" / "a.png", 0, (20, 16))
    save(tmp_path / "in" / "b.png", 1, (80, 40))
    save(tmp_path / "in" / "c.jpg", 2, (30, 90))
    assert run("images", tmp_path / "in", tmp_path / "out", "--held-out", 0, "--size", 20) == 0
    (_, a), (b_name, b), (c_name, c) = contents(tmp_path / "out" / "train")
    assert a == small
    assert (b_name[-4:], Image.open(io.BytesIO(b)).size) == (".png", (40, 20))
    assert (c_name[-4:], Image.open(io.BytesIO(c)).size) == (".jpg", (20, 60))


def test_unreadable_pictures_are_listed_and_skipped(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = save(pictures / "cut.png", 7)
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "text.jpg").write_text("no picture")
    (pictures / "notes.md").write_text("not even by its name")
    assert run("images", pictures, tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert [Path(path).name for path, _ in record["skipped"]] == ["cut.png", "text.jpg"]
    assert sum(shard["samples"] for shard in record["shards"]) == 40
    assert "skipped 2 images in all" in capsys.readouterr().err


ROWS = [("a.png", "a red square"), ("a.png", "a square,\nin red"), ("b.png", 'he said "blue"'), ("c.png", "  ")]
"""Two captions of one picture, one with a quote, and an empty one. Line breaks are possible in .csv and .jsonl."""


def write_table(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"picture": picture, "title": text}) + "\n" for picture, text in ROWS))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("title", "picture"), *((text, picture) for picture, text in ROWS)])
    else:
        rows = [("picture", "title"), *ROWS]
        path.write_text("".join(f"{picture}\t{' '.join(text.split())}\n" for picture, text in rows))


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_pairs_from_every_kind_of_table(kind: str, tmp_path: Path) -> None:
    data = {name: save(tmp_path / "pictures" / f"{name}.png", seed) for seed, name in enumerate("abc")}
    table = tmp_path / f"table.{kind}"
    write_table(table)
    assert (
        run(
            "pairs",
            table,
            tmp_path / "out",
            "--held-out",
            0,
            "--root",
            tmp_path / "pictures",
            "--image",
            "picture",
            "--caption",
            "title",
        )
        == 0
    )
    assert contents(tmp_path / "out" / "train") == [
        ("000000000.png", data["a"]),
        ("000000000.txt", b"a red square\na square, in red"),
        ("000000001.png", data["b"]),
        ("000000001.txt", b'he said "blue"'),
    ]
    skipped = json.loads((tmp_path / "out" / "shards.json").read_text())["skipped"]
    assert skipped == [[str(tmp_path / "pictures" / "c.png"), "empty caption"]]


def test_the_rest_of_a_row_is_caption_where_that_is_said(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    (tmp_path / "table.csv").write_text("image,caption\na.png,a dog, running on grass\n")
    assert run("pairs", tmp_path / "table.csv", tmp_path / "out", "--held-out", 0, "--rest-is-caption") == 0
    assert contents(tmp_path / "out" / "train")[1][1] == b"a dog, running on grass"


def test_an_array_of_texts_is_not_cut_into_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert run("texts", tmp_path / "a.json", tmp_path / "out", "--held-out", 0) == 0
    assert contents(tmp_path / "out" / "train")[0][1] == b'{"text": "one"}\n{"text": "two"}\n'


def test_pictures_of_a_table_are_relative_to_it(tmp_path: Path) -> None:
    save(tmp_path / "data" / "pictures" / "a.png", 0)
    (tmp_path / "data" / "table.tsv").write_text("image\tcaption\npictures/a.png\ta\n")
    assert run("pairs", tmp_path / "data" / "table.tsv", tmp_path / "out", "--held-out", 0) == 0


def test_texts_keep_every_document(tmp_path: Path) -> None:
    plain = [f"plain {number}" for number in range(2500)]
    records = ["two\nlines", "Grüße, 世界"]
    (tmp_path / "a.txt").write_text("\n".join(plain[:1000]) + "\n\n  \n" + "\n".join(plain[1000:]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in [*records, " "]))
    assert (
        run("texts", tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "out", "--held-out", 0.2, "--per-shard", 1000)
        == 0
    )
    sides = {}
    for side in ("train", "held_out"):
        members = contents(tmp_path / "out" / side)
        assert all(name.endswith(".jsonl") for name, _ in members)
        sides[side] = [json.loads(line)["text"] for _, data in members for line in data.decode().split("\n") if line]
    assert sorted(sides["train"] + sides["held_out"]) == sorted(plain + records)
    assert 0.1 < len(sides["held_out"]) / 2502 < 0.3
    shards = json.loads((tmp_path / "out" / "shards.json").read_text())["shards"]
    assert sum(shard["samples"] for shard in shards) == 2502
    assert max(shard["samples"] for shard in shards) == 1000


def test_demo_feeds_all_three_streams(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("demo", tmp_path / "demo", "--limit", 60, "--held-out", 0.2)
    assert run(*arguments) == 0
    shards = json.loads((tmp_path / "demo" / "shards.json").read_text())["shards"]
    for stream in Stream:
        name = stream.name.lower()
        for side in ("train", "held_out"):
            open_table(str(tmp_path / "demo" / name / side / "*.tar"), f"data.{name}", stream, str(cache))
        samples = sum(shard["samples"] for shard in shards if shard["file"].startswith(name))
        assert samples == (120 if stream == Stream.PAIRS else 60)  # Pairs: as many emoji as pictures of shapes.
    pairs = contents(tmp_path / "demo" / "pairs" / "train") + contents(tmp_path / "demo" / "pairs" / "held_out")
    captions = [data.decode() for name, data in pairs if name.endswith(".txt")]
    # What is read in stored order, as validations read, has both kinds from the beginning.
    assert 4 < sum(re.fullmatch(r"a \w+ (circle|rectangle|triangle)", text) is not None for text in captions[:20]) < 16
    assert "1st place medal" in captions and "a red circle" in captions
    drawings = [np.asarray(Image.open(io.BytesIO(data))) for name, data in pairs if name.endswith(".png")]
    assert {drawing.shape for drawing in drawings} == {(128, 128, 3), (64, 64, 3)}
    assert all(drawing.std() > 5 for drawing in drawings)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    capsys.readouterr()
    assert run(*arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'demo'} is complete\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == before

    next((tmp_path / "demo" / "texts" / "train").iterdir()).unlink()
    assert run(*arguments) == 2
    assert "is missing or cut" in capsys.readouterr().err


def test_emoji_without_a_drawing_are_left_out() -> None:
    assert demo_sources.draw_emoji("\U0001f602") is not None
    assert demo_sources.draw_emoji("\U0001faeb") is None  # Younger than the font.
    assert demo_sources.draw_emoji("\U0001f602\U0001f602") is None  # Two drawings.


def test_dictionary_is_clean_and_of_the_expected_size() -> None:
    texts = list(build_shards.dictionary_documents())
    assert 100_000 < len(texts) < 110_000
    assert 13e6 < sum(len(text.encode()) for text in texts) < 15e6
    assert len(set(texts)) == len(texts)
    assert sum("1913 Webster]" in text or "<--" in text or "PJC" in text for text in texts) < 10
    assert "crex: a genus of birds including the corncrake (Crex crex)." in texts


@pytest.mark.slow
def test_killed_build_never_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word\n" * 2_000_000)
    command = [sys.executable, str(TOOL), "texts", str(tmp_path / "long.txt"), str(tmp_path / "out"), "--held-out", "0"]
    process = subprocess.Popen(command, env=os.environ)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/train/*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert subprocess.run([*command, "--limit", "3000"], env=os.environ).returncode == 0
    assert [len(data.splitlines()) for _, data in contents(tmp_path / "out" / "train")] == [1000, 1000, 1000]
    assert not (tmp_path / "out.partial").exists()


def test_bad_input_is_one_line_and_code_2(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.tsv").write_text("image\ttext\n")
    (tmp_path / "short.csv").write_text("image,caption\na.png\n")
    rows = [f"{number % 4}/{number:02d}.png,a dog" for number in range(40)]
    (tmp_path / "long.csv").write_text("\n".join(["image,caption", *rows[:37], rows[37] + ", running", *rows[38:]]))
    (tmp_path / "table.xls").write_text("")
    (tmp_path / "rows.tsv").write_text("image\tcaption\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    out = tmp_path / "out"
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("there is no folder", ("images", tmp_path / "absent", out)),
        ("no image below", ("images", tmp_path / "empty", out)),
        ("already exists", ("images", pictures, tmp_path / "used")),
        ("--held-out 1 is not in", ("images", pictures, out, "--held-out", 1)),
        ("--per-shard 0 is less than 1", ("images", pictures, out, "--per-shard", 0)),
        ("none of its 40 usable samples falls into held_out", ("images", pictures, out, "--held-out", 1e-9)),
        ("rows.tsv: there is no usable sample", ("pairs", tmp_path / "rows.tsv", out)),
        ("empty.txt: there is no usable sample", ("texts", tmp_path / "empty.txt", out)),
        ("has no column 'caption'; its columns are image, text: name those of", ("pairs", tmp_path / "table.tsv", out)),
        ("short.csv, line 2: too few columns", ("pairs", tmp_path / "short.csv", out)),
        ("long.csv, line 39: too many columns", ("pairs", tmp_path / "long.csv", out, "--root", pictures)),
        ("a table ends in", ("pairs", tmp_path / "table.xls", out)),
        ("there is no file", ("pairs", tmp_path / "absent.tsv", out)),
        ("bad.jsonl, line 2: no string in the field 'text'", ("texts", tmp_path / "bad.jsonl", out)),
        ("bad.txt, line 2: not UTF-8", ("texts", tmp_path / "bad.txt", out)),
    ]
    for message, arguments in cases:
        assert run(*arguments) == 2, message
        gc.collect()  # files that were left open would complain
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not out.exists()


def test_what_is_left_out_of_a_folder_is_told(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linked folders are read, in any case of extensions; what is no picture is counted by reason."""
    (tmp_path / "elsewhere").mkdir()
    (pictures / "0" / "00.png").rename(tmp_path / "elsewhere" / "x.PNG")
    (pictures / "linked").symlink_to(tmp_path / "elsewhere")
    for name in ("._a.png", ".DS_Store", "notes.txt", "b.psd", "c.psd"):
        (pictures / name).write_bytes(b"content")
    os.mkfifo(pictures / "pipe.png")
    assert run("images", pictures, tmp_path / "out", "--held-out", 0) == 0
    record = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert record["shards"][0]["samples"] == 40 and record["skipped"] == []
    expected = {"hidden": [2, ".DS_Store"], "extension .psd": [2, "b.psd"], "extension .txt": [1, "notes.txt"]}
    assert record["left_out"] == expected | {"not a regular file": [1, "pipe.png"]}
    assert "left out 2 files: extension .psd; the first is b.psd" in capsys.readouterr().err
