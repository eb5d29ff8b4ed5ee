"""The index finds exactly the members that are whole, and joins them as one sample by key."""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import os
import pickle
import tarfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from beit3_dist.data import cache, index
from beit3_dist.data.index import Share, Table, expand, open_table
from beit3_dist.data.order import Stream
from beit3_dist.data.reader import ShardReader
from beit3_dist.data.tars import Tar
from tests.unit.tar_fixtures import image_tar, pair_tar, picture, write_tar


def raw_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of members in the given order."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def table_of(tmp_path: Path, stream: Stream, pattern: str = "*.tar") -> Table:
    return open_table(str(tmp_path / pattern), f"data.{stream.name.lower()}", stream, str(tmp_path / "cache"))


def contents(table: Table) -> list[tuple[str, bytes, bytes]]:
    """Key, image bytes and text bytes of every sample."""
    reader = ShardReader(table)
    return [
        (
            table.key(number),
            *(
                reader.read(int(row["shard"]), *map(int, row[name])) if row[name][1] > 0 else b""
                for name in ("image", "text")
            ),
        )
        for number, row in enumerate(table.rows)
    ]


def test_expand_braces_and_globs_sorted_once(tmp_path: Path) -> None:
    for name in ("b-01.tar", "a-00.tar", "a-01.tar", "a-02.tar"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(path).name for path in expand(str(tmp_path / "{a-{00..02},a-*,b-01}.tar"), "data.images")]
    assert names == ["a-00.tar", "a-01.tar", "a-02.tar", "b-01.tar"]


def test_a_named_file_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank looks at every shard: each look is one more request to the file system."""
    paths = [str(image_tar(tmp_path / f"a-{number}.tar", 1)) for number in range(3)]
    looks, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, *rest, **more: looks.append(path) or stat(path, *rest, **more))
    assert expand(str(tmp_path / "a-{0..2}.tar"), "data.images") == paths
    assert looks == paths


def test_expand_names_the_field_and_the_missing_shard(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^data.images: no file matches '.*x/\*.tar'$"):
        expand(str(tmp_path / "x/*.tar"), "data.images")
    with pytest.raises(
        ValueError, match=rf"no file matches '.*': it is a folder; name its files, as by {tmp_path}/\*.tar$"
    ):
        expand(f"{tmp_path}/", "data.images")
    with pytest.raises(ValueError, match=r"data.pairs: no file matches '.*/1.tar'"):
        expand(str(tmp_path / "{0..1}.tar"), "data.pairs")
    with pytest.raises(ValueError, match="eval.texts: no pattern"):
        expand("", "eval.texts")


def test_brackets_that_exist_as_they_are_written_are_meant_so(tmp_path: Path) -> None:
    for name in ("run[1]/a-0.tar", "run[1]/b[0-9].tar", "run1/a-0.tar", "run1/b5.tar", "x[2]-0.tar", "y[a]/[b]-1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def found(pattern: str) -> list[str]:
        return [os.path.relpath(path, tmp_path) for path in expand(str(tmp_path / pattern), "data.images")]

    assert found("run[1]/*.tar") == ["run[1]/a-0.tar", "run[1]/b[0-9].tar"], "not the folder run1"
    assert found("run[1]/a-{0..0}.tar") == ["run[1]/a-0.tar"]
    assert found("run[1]/b[0-9].tar") == ["run[1]/b[0-9].tar"]
    assert found("run1/b[0-9].tar") == ["run1/b5.tar"], "a class of characters where nothing is called so"
    assert found("run[0-9]/a-*.tar") == ["run1/a-0.tar"]
    assert found("x[2]-*.tar") == ["x[2]-0.tar"] and found("y[a]/[b]-*.tar") == ["y[a]/[b]-1.tar"]


def test_braces_that_do_not_close_name_the_field(tmp_path: Path) -> None:
    for pattern in (str(tmp_path / "{0..1.tar"), str(tmp_path / "0}.tar")):
        with pytest.raises(ValueError, match="data.images: .* is no pattern"):
            expand(pattern, "data.images")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_tarfile(tmp_path: Path, form: int) -> None:
    """Long names, directories, links and empty members, in the three formats there are."""
    contents = [("plain.jpg", b"1" * 700), ("d" * 90 + "/" + "n" * 90 + ".jpg", b"22"), ("empty.txt", b"")]
    if form != tarfile.USTAR_FORMAT:  # Which has no room for longer names.
        contents.append(("b" * 512 + ".png", b"3"))
    path = raw_tar(tmp_path / "a.tar", contents, form)
    with tarfile.open(path, "a", format=form) as tar:
        folder, link = tarfile.TarInfo("folder"), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "plain.jpg"
        tar.addfile(folder)
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("last.jpg"))
    with tarfile.open(path) as tar:
        expected = [(member.name.encode(), member.offset_data, member.size) for member in tar if member.isreg()]
    with Tar(str(path)) as tar:
        entries = list(tar)
    assert [entry[:3] for entry in entries if not entry.odd] == expected
    assert [(entry.name, entry.odd) for entry in entries if entry.odd] == [(b"link.jpg", "a symbolic link")]


def test_keys_with_dots_folders_and_non_adjacent_members(tmp_path: Path) -> None:
    raw_tar(
        tmp_path / "a.tar",
        [
            ("x/img.0001.final.JPG", b"A"),
            ("x/img.0002.final.jpg", b"B"),
            ("y/img.0001.final.jpg", b"C"),
            ("x/img.0002.final.txt", b"b"),
            ("y/img.0001.final.txt", b"c"),
            ("x/img.0001.final.txt", b"a"),
            ("x/img.0001.final.cls", b"7"),
            ("x/._img.0001.final.jpg", b"mac"),
        ],
    )
    assert contents(table_of(tmp_path, Stream.PAIRS)) == [
        ("x/img.0001.final", b"A", b"a"),
        ("x/img.0002.final", b"B", b"b"),
        ("y/img.0001.final", b"C", b"c"),
    ]


def test_keys_start_again_in_each_shard(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", [("0.jpg", b"A"), ("0.txt", b"a")])
    raw_tar(tmp_path / "b.tar", [("0.jpg", b"B"), ("0.json", b"{}")])
    table = table_of(tmp_path, Stream.PAIRS)
    assert contents(table) == [("0", b"A", b"a"), ("0", b"B", b"{}")]
    assert table.rows["kind"].tolist() == [index.TXT, index.JSON]


@pytest.mark.parametrize("names", [("k.jpg", "k.jpg"), ("k.jpg", "k.png")])
def test_a_second_member_of_a_kind_is_an_error(tmp_path: Path, names: tuple[str, str]) -> None:
    raw_tar(tmp_path / "a.tar", [(name, b"1") for name in names])
    with pytest.raises(ValueError, match=r"a.tar: key 'k' has a second image member"):
        table_of(tmp_path, Stream.IMAGES)


def test_incomplete_samples_are_left_out(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", [("0.jpg", b"A"), ("1.jpg", b"B"), ("1.txt", b"b"), ("2.txt", b"c")])
    table = table_of(tmp_path, Stream.PAIRS)
    assert [key for key, *_ in contents(table)] == ["1"]
    [[shard, lacking]] = table.notes["left_out"]
    assert shard.endswith("a.tar")
    assert lacking == {"no image member": [1, "2"], "no .txt or .json member": [1, "0"]}
    assert len(table_of(tmp_path, Stream.IMAGES)) == 2


@pytest.mark.parametrize(
    ("stream", "needs"),
    [
        (Stream.PAIRS, "an image member and a .txt or .json member of the same key"),
        (Stream.TEXTS, "a .txt or .jsonl member"),
    ],
)
def test_empty_stream_names_field_and_needs(tmp_path: Path, stream: Stream, needs: str) -> None:
    image_tar(tmp_path / "a.tar", 2)
    with pytest.raises(ValueError, match=f"^data.{stream.name.lower()}: no sample in 1 shard.*: each needs {needs}$"):
        table_of(tmp_path, stream)


@pytest.mark.parametrize("where", ["inside a header", "inside a member", "between members", "inside the last padding"])
def test_cut_tar_yields_whole_members_only(tmp_path: Path, where: str) -> None:
    whole = pair_tar(tmp_path / "whole.tar", 6)
    with tarfile.open(whole) as tar:
        found = tar.getmembers()
    third = found[4]  # First member of the third sample: two samples lie before it.
    end = {
        "inside a header": third.offset + 100,
        "inside a member": third.offset_data + third.size // 2,
        "between members": third.offset_data + (third.size + 511) // 512 * 512,
        "inside the last padding": third.offset_data + third.size,
    }[where]
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:end])
    table = table_of(tmp_path, Stream.PAIRS, "cut.tar")
    assert contents(table) == contents(table_of(tmp_path, Stream.PAIRS, "whole.tar"))[:2]
    [[shard, reason]] = table.notes["damage"]
    assert shard.endswith("cut.tar") and f"cut at byte {end}" in reason


def test_broken_header_ends_a_shard(tmp_path: Path) -> None:
    path = image_tar(tmp_path / "a.tar", 4)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[third + 5] ^= 1
    path.write_bytes(content)
    table = table_of(tmp_path, Stream.IMAGES)
    assert len(table) == 2 and f"broken member header at byte {third}" in table.notes["damage"][0][1]


def test_what_is_no_tar_is_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.jpg" * 100))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 10)
    with pytest.raises(ValueError, match="a.tar is not a plain tar"):
        table_of(tmp_path, Stream.IMAGES)


def packed(path: Path, name: str) -> Path:
    """The tar's .tar.gz."""
    target = path.parent.parent / name
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_compressed_tars_are_unpacked_once(tmp_path: Path, name: str) -> None:
    plain = pair_tar(tmp_path / "plain" / "a.tar", 4)
    path = packed(plain, name)
    table = table_of(tmp_path, Stream.PAIRS, name)
    assert contents(table) == contents(table_of(tmp_path, Stream.PAIRS, "plain/a.tar"))
    assert table.shard(0) == str(path.resolve())  # Reports name what the user knows.
    [copy] = (tmp_path / "cache").glob("*.tar")
    before = copy.stat().st_mtime_ns
    assert table_of(tmp_path, Stream.PAIRS, name).files == table.files and copy.stat().st_mtime_ns == before
    packed(pair_tar(tmp_path / "plain" / "a.tar", 6, seed=9), name)
    assert len(table_of(tmp_path, Stream.PAIRS, name)) == 6
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1  # The stale copy is gone.


def test_cut_compressed_tar_yields_whole_samples_only(tmp_path: Path) -> None:
    whole = pair_tar(tmp_path / "plain" / "a.tar", 4)
    expected = contents(table_of(tmp_path, Stream.PAIRS, "plain/a.tar"))
    data = packed(whole, "a.tar.gz").read_bytes()
    kept = set()
    for end in range(1, len(data), len(data) // 12):
        (tmp_path / "a.tar.gz").write_bytes(data[:end])
        try:
            table = table_of(tmp_path, Stream.PAIRS, "a.tar.gz")
        except ValueError as error:
            assert "a.tar.gz" in str(error)
            continue
        kept.add(len(table))
        assert contents(table) == expected[: len(table)]
        if len(table) < len(expected):  # What is lost may be zeros after the last sample.
            assert table.notes["damage"][0][0].endswith("a.tar.gz")
    assert len(kept) > 1
    (tmp_path / "a.tar.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="a.tar.gz is no gzip archive"):
        table_of(tmp_path, Stream.PAIRS, "a.tar.gz")


def test_cut_at_every_byte_yields_whole_samples_only(tmp_path: Path) -> None:
    """All samples before the cut, each byte of them, and no other; the damage is told at every place but the end."""
    pairs = [(f"{number}.{kind}", picture(number, 5, 4) if kind == "png" else b"caption %d" % number)
             for number in range(3) for kind in ("png", "txt")]  # fmt: skip
    data = raw_tar(tmp_path / "whole.tar", pairs, tarfile.USTAR_FORMAT).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [member.offset_data + member.size for member in tar]
    trailer = max(ends) // 512 * 512 + 512
    cut = tmp_path / "cut.tar"
    for end in range(trailer + 1024):
        cut.write_bytes(data[:end])
        found = index.scan(str(cut))
        rows, _ = index._rows(0, found, Stream.PAIRS)
        complete = sum(number_end <= end for number_end in ends[1::2])
        assert len(rows) == complete, f"cut at byte {end}"
        for number, row in enumerate(rows):
            image, text = (data[offset : offset + size] for offset, size in (row["image"], row["text"]))
            assert (image, text) == (pairs[2 * number][1], pairs[2 * number + 1][1])
            assert max(row["image"].sum(), row["text"].sum()) <= end
        assert bool(found.damage) == (end < trailer + 512), f"cut at byte {end}"


def test_each_shard_is_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_tar(tmp_path / "a.tar", 2)
    first = contents(table_of(tmp_path, Stream.IMAGES))
    scanned: list[str] = []
    scan = index.scan
    monkeypatch.setattr(index, "scan", lambda path: scanned.append(Path(path).name) or scan(path))
    assert contents(table_of(tmp_path, Stream.IMAGES)) == first and scanned == []
    image_tar(tmp_path / "b.tar", 3, seed=50)
    assert len(table_of(tmp_path, Stream.IMAGES)) == 5 and scanned == ["b.tar"]
    image_tar(tmp_path / "a.tar", 4, seed=70)  # Written anew: the old sidecar is stale.
    table = table_of(tmp_path, Stream.IMAGES)
    assert len(table) == 7 and scanned == ["b.tar", "a.tar"]
    assert contents(table)[0] != first[0]
    sidecar = index.sidecar_path(table.paths[0], table.file.parent)
    sidecar.write_bytes(b"PK broken")
    assert table.key(0) == "0000" and scanned == ["b.tar", "a.tar", "a.tar"]


def test_a_shard_that_changes_under_the_run_stops_it(tmp_path: Path) -> None:
    path = image_tar(tmp_path / "a.tar", 2)
    table = table_of(tmp_path, Stream.IMAGES)
    os.utime(path, ns=(0, 0))
    with pytest.raises(RuntimeError, match="a.tar changed since it was indexed"):
        contents(table)


def _open_and_count(arguments: tuple[str, str]) -> tuple[int, int]:
    scans = 0
    scan = index.scan

    def counted(path: str) -> index.Scan:
        nonlocal scans
        scans += 1
        return scan(path)

    index.scan = counted
    return len(open_table(arguments[0], "data.images", Stream.IMAGES, arguments[1])), scans


def test_one_process_of_many_builds(tmp_path: Path) -> None:
    for number in range(4):
        image_tar(tmp_path / f"{number}.tar", 3, seed=10 * number)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_open_and_count, [(str(tmp_path / "*.tar"), str(tmp_path / "cache"))] * 4, chunksize=1)
    assert [length for length, _ in found] == [12] * 4
    assert sum(scans for _, scans in found) == 4
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_processes_share_the_scanning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before one of them builds the table, each has scanned its part; the builder scans what is missing yet."""
    for number in range(5):
        image_tar(tmp_path / f"{number}.tar", 1, seed=number)
    scanned: list[str] = []
    scan, locked = index.scan, cache.locked
    monkeypatch.setattr(index, "scan", lambda path: scanned.append(Path(path).stem) or scan(path))

    def wait_for_ever(target: Path) -> None:
        raise TimeoutError

    monkeypatch.setattr(cache, "locked", wait_for_ever)
    for number, own in enumerate(({"0"}, {"1", "2"})):
        scanned.clear()
        with pytest.raises(TimeoutError):
            open_table(str(tmp_path / "*.tar"), "", Stream.IMAGES, str(tmp_path / "cache"), Share(number, 3))
        assert set(scanned) == own and len(scanned) == len(own)
    monkeypatch.setattr(cache, "locked", locked)
    scanned.clear()
    assert len(table_of(tmp_path, Stream.IMAGES)) == 5 and sorted(scanned) == ["3", "4"]
    assert [shard for number in range(3) for shard in Share(number, 3).of(5)] == list(range(5))


def test_a_table_travels_without_its_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": f"{number:05d}", "jpg": b"1"} for number in range(3000)])
    table = table_of(tmp_path, Stream.IMAGES)
    reader = ShardReader(table)
    assert reader.read(0, *map(int, table.rows[7]["image"])) == b"1"
    sent = pickle.dumps(reader)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    assert np.array_equal(again.table.rows, table.rows) and again.read(0, *map(int, table.rows[7]["image"])) == b"1"


def test_open_files_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3_dist.data.reader.OPEN_FILES", 2)
    for number in range(5):
        image_tar(tmp_path / f"{number}.tar", 1, seed=number)
    table = table_of(tmp_path, Stream.IMAGES)
    reader = ShardReader(table)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for row in table.rows:
            assert reader.read(int(row["shard"]), *map(int, row["image"]))[:4] == b"\x89PNG"
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_unwritable_cache_names_its_field(tmp_path: Path) -> None:
    image_tar(tmp_path / "a.tar", 1)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="^data.cache: cannot make the folder"):
        table_of(tmp_path, Stream.IMAGES)


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(index, "PROGRESS_SECONDS", -1.0)
    image_tar(tmp_path / "a.tar", 1)
    with caplog.at_level(logging.INFO):
        table = table_of(tmp_path, Stream.IMAGES)
    assert "indexing images: 1 of 1 shards" in caplog.text
    assert json.loads(table.file.with_suffix(".json").read_text()) == {"damage": [], "left_out": []}


def test_one_slow_shard_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first shard's scan ends last: of the others nothing is kept but their rows of the table, and those once."""
    shards, samples = 100, 3_000
    for number in range(shards):
        (tmp_path / f"{number:02d}.tar").touch()
    places = np.full((samples, 4, 2), -1)
    places[:, index.IMAGE] = np.arange(2 * samples).reshape(-1, 2)
    others = threading.Semaphore(0)

    def scan(path: str, *_: object) -> index.Scan:
        if path.endswith("00.tar"):
            for _ in range(shards - 1):
                others.acquire()
        else:
            others.release()
        return index.Scan(places.copy(), np.empty(0, np.uint8), np.empty(0, np.int64), "")

    monkeypatch.setattr(index, "shard_scan", scan)
    tracemalloc.start()
    table = table_of(tmp_path, Stream.IMAGES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = shards * samples * index.ROW.itemsize
    assert peak < 1.5 * size, f"{peak / size:.2f} tables"
    assert len(table) == shards * samples and table.rows["shard"].tolist() == np.repeat(range(shards), samples).tolist()
    assert np.array_equal(table.rows["image"], np.tile(places[:, index.IMAGE], (shards, 1)))
