"""Tables with pictures become shards row by row; what is no such table is told in one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from beit3_dist.data.index import expand
from beit3_dist.data.parquet import picture_rows
from tests.unit.tar_fixtures import picture
from tests.unit.test_build_shards import contents, run, save
from tools import check_shards

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(path: Path, pictures: list[Any], **columns: Any) -> Path:
    """A file as Hugging Face's `datasets` write it, in row groups of three."""
    rows = [one if isinstance(one, dict) or one is None else {"bytes": one, "path": None} for one in pictures]
    made = pa.table({"image": pa.array(rows, PICTURE)} | columns)
    pq.write_table(made, path, row_group_size=3, use_dictionary=False, compression="zstd")
    return path


def bomb() -> bytes:
    """A small PNG with more pixels than are allowed."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def test_pairs_classes_and_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files of a folder: captions of two columns; what cannot be used is named by file and row."""
    (tmp_path / "data").mkdir()
    good = [picture(0), picture(1, kind="JPEG"), picture(2, kind="WEBP"), picture(3)]
    texts = [["a dog", " two\ndogs "], ["a cat"], [], None]
    alt = pa.array(["dog", None, "a bird", ""])
    table(tmp_path / "data" / "0.parquet", good, caption=pa.array(texts, pa.list_(pa.string())), alt=alt,
          label=pa.array([3, 1, 2, 0]))  # fmt: skip
    bad = [None, {"bytes": None, "path": "a/b.jpg"}, b"no picture", bomb(), picture(4)]
    table(tmp_path / "data" / "1.parquet", bad, caption=pa.array([["x"]] * 5, pa.list_(pa.string())),
          alt=pa.array(["y"] * 5), label=pa.array([0, 0, 0, 0, -1]))  # fmt: skip
    ask = ("parquet", tmp_path / "data")
    assert run(*ask, tmp_path / "pairs", "--caption", "caption", "alt", "--held-out", 0) == 0
    found = dict(contents(tmp_path / "pairs" / "train"))
    assert found["000000000.png"] == good[0] and found["000000000.txt"] == b"a dog\ntwo dogs\ndog"
    assert found["000000001.jpg"] == good[1] and found["000000002.webp"] == good[2]
    assert found["000000002.txt"] == b"a bird" and len(found) == 2 * 4
    skipped = json.loads((tmp_path / "pairs" / "shards.json").read_text())["skipped"]
    second = f"{tmp_path}/data/1.parquet, row"
    places = [f"{tmp_path}/data/0.parquet, row 4", *(f"{second} {n}" for n in (1, 2, 3, 4))]
    assert [name for name, _ in skipped] == places
    assert [reason.partition(":")[0] for _, reason in skipped] == [
        "empty caption", "no picture in it", "no picture in it, only its name 'a/b.jpg'", "undecodable image",
        "more pixels than data.max_pixels=100000000",
    ]  # fmt: skip
    assert f"skipped {second} 2: no picture in it, only its name 'a/b.jpg'" in capsys.readouterr().err

    assert run(*ask, tmp_path / "images", "--label", "label", "--held-out", 0, "--size", 16) == 0
    found = dict(contents(tmp_path / "images" / "train"))
    assert [found[f"00000000{n}.cls"] for n in range(4)] == [b"3", b"1", b"2", b"0"]
    assert min(Image.open(io.BytesIO(found["000000000.png"])).size) == 16 and len(found) == 8
    [fault] = [f for f in json.loads((tmp_path / "images" / "shards.json").read_text())["skipped"] if "row 5" in f[0]]
    assert fault[1] == "the class -1 is no number of one"
    shards = ["--pairs", f"{tmp_path}/pairs/train/*.tar", "--images", f"{tmp_path}/images/train/*.tar"]
    assert check_shards.main([*shards, "--jobs", "1", "--cache", str(tmp_path / "cache")]) == 0


def test_a_large_file_is_read_piece_by_piece(tmp_path: Path) -> None:
    """Of 32 MB in eight row groups one is in memory; what follows a damaged page of a group is counted."""
    noise = np.random.default_rng(0).bytes(160_000)
    path = tmp_path / "a.parquet"
    rows = [{"bytes": n.to_bytes(2, "big") + noise, "path": None} for n in range(200)]
    written: dict[str, Any] = {"use_dictionary": False, "compression": "zstd", "row_group_size": 25}
    written |= {"write_page_checksum": True}
    pq.write_table(pa.table({"image": pa.array(rows, PICTURE)}), path, **written)
    del rows
    before, most, number = pa.total_allocated_bytes(), 0, -1
    for number, row in enumerate(picture_rows(path, "image", (), "")):
        most = max(most, pa.total_allocated_bytes() - before)
        assert row.picture[:2] == number.to_bytes(2, "big") and row.place == f"{path}, row {number + 1}"
    assert number == 199 and most < 12 << 20
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = b"\0" * 4096
    path.write_bytes(content)
    found = list(picture_rows(path, "image", (), ""))
    faults = [row for row in found if row.fault]
    assert faults and all(row.fault.startswith("damaged: ") and " to " in row.place for row in faults)
    assert len(found) - len(faults) in (150, 175), "the other groups' pictures are there"


def test_a_group_that_unpacks_to_anything_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"bytes": bytes(1 << 20), "path": None}] * 100
    pq.write_table(pa.table({"image": pa.array(rows, PICTURE)}), path, use_dictionary=False, compression="zstd")
    [row] = picture_rows(path, "image", (), "")
    assert row.place == f"{path}, rows 1 to 100" and row.fault.startswith("image.bytes unpacks to more than 200 times")


def addresses(path: Path) -> None:
    pq.write_table(pa.table({"URL": ["http://a/b.jpg"], "TEXT": ["a dog"]}), path)


def of_img2dataset(path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://a/b.jpg"], "key": ["000000000"]}), path)
    path.with_suffix(".tar").write_bytes(b"")


REFUSED: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "laion": (addresses, [], "has addresses (URL) and no pictures; nothing is downloaded here: img2dataset makes tars"),
    "img2dataset": (of_img2dataset, [], "is img2dataset's table of a.tar, which has the pictures"),
    "no column": (
        lambda p: table(p, [None]), ["--caption", "text"], "no column 'text'; its columns are image: name one by"
    ),
    "numbers": (lambda p: table(p, [None], text=pa.array([1])), ["--caption", "text"], "'text' is int64, not text,"),
    "words": (lambda p: pq.write_table(pa.table({"image": ["a.jpg"]}), p), [], "'image' is string, not bytes, or"),
    "no label": (lambda p: table(p, [None], label=pa.array(["dog"])), ["--label", "label"], "'label' is string, not a"),
    "no table": (lambda p: p.write_bytes(b"PAR1" + b"x" * 99), [], "is no parquet file: "),
    "nothing": (lambda p: p.write_bytes(b""), [], "is no parquet file: "),
    "no file": (lambda p: None, [], "there is no file "),
    "only bad": (lambda p: table(p, [None, b"x"]), [], "there is no usable sample"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make, options, message = REFUSED[case]
    make(tmp_path / "a.parquet")
    assert run("parquet", tmp_path / "a.parquet", tmp_path / "out", *options) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and last.startswith("build_shards.py: ") and not (tmp_path / "out").exists()


def test_a_run_is_told_of_tables_without_pictures(tmp_path: Path) -> None:
    """A wildcard over a download: img2dataset's tables lie beside their tars, LAION's alone."""
    addresses(tmp_path / "laion.parquet")
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(
        ValueError, match="data.pairs: .*laion.parquet is a table and no tar: .* img2dataset of one with"
    ):
        expand(f"{tmp_path}/*", "data.pairs")


def test_captions_of_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [save(tmp_path / "train" / f"{n}.jpg", n) for n in range(3)]
    images = [{"id": 9 - n, "file_name": f"{n}.jpg"} for n in range(3)]
    told_of = [(8, "a cat"), (9, "a dog"), (1, "?"), (8, "two\n cats")]
    captions = [{"image_id": image, "caption": caption} for image, caption in told_of]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    ask = ("coco", tmp_path / "c.json", tmp_path / "train")
    assert run(*ask, tmp_path / "out", "--held-out", 0) == 0
    assert contents(tmp_path / "out" / "train") == [
        ("000000000.jpg", pictures[0]), ("000000000.txt", b"a dog"),
        ("000000001.jpg", pictures[1]), ("000000001.txt", b"a cat\ntwo cats"),
    ]  # fmt: skip
    told = capsys.readouterr().err
    assert "1 files: annotations of no image" in told and "images without a caption; the first is 2.jpg" in told
    images[0]["file_name"] = "../c.json"
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    assert run(*ask, tmp_path / "out2") == 2
    assert "leads out of" in capsys.readouterr().err
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": [{"bbox": []}]}))
    assert run(*ask, tmp_path / "out2") == 2
    assert "annotation 1: no caption: COCO's captions lie in captions_*.json" in capsys.readouterr().err
