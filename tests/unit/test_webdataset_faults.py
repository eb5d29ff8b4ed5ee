"""Each fault that was found in webdataset's own reading: shown there, and shown to be absent here."""

from __future__ import annotations

import os
import tarfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import webdataset

from beit3_dist.data.index import open_table
from beit3_dist.data.order import Stream
from beit3_dist.data.reader import ShardReader
from beit3_dist.data.streams import ImageStream, Origin
from tests.unit.tar_fixtures import image_tar, picture, write_tar
from tests.unit.test_index import raw_tar

LIMIT = 100_000


def by_webdataset(*paths: Path, **settings: Any) -> Iterator[dict[str, Any]]:
    """Samples as plain webdataset reads them, shards in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, **settings)


def by_us(pattern: Path, cache: Path) -> list[tuple[str, bytes, bytes]]:
    """Key, picture and caption of each pair of the index."""
    table = open_table(str(pattern), "data.pairs", Stream.PAIRS, str(cache))
    reader = ShardReader(table)
    return [
        (table.key(number), *(reader.read(int(row["shard"]), *map(int, row[part])) for part in ("image", "text")))
        for number, row in enumerate(table.rows)
    ]


def images(pattern: Path, cache: Path) -> ImageStream:
    return ImageStream(Origin(str(pattern), "data.images", 0, str(cache)), LIMIT)


def cut(path: Path, member: int, inside: int = 0) -> None:
    """Ends a tar `inside` bytes after the start of a member's content, or before its header."""
    with tarfile.open(path) as tar:
        found = tar.getmembers()[member]
    path.write_bytes(path.read_bytes()[: found.offset_data + inside if inside else found.offset])


def test_1_a_cut_sample_is_not_completed_by_the_next_shard(tmp_path: Path) -> None:
    first = raw_tar(tmp_path / "0.tar", [("k.jpg", b"A"), ("k.txt", b"caption of A")])
    second = raw_tar(tmp_path / "1.tar", [("k.txt", b"caption of B"), ("k.jpg", b"B")])
    cut(first, member=1, inside=4)
    with mock.patch("time.sleep"):
        theirs = list(by_webdataset(first, second, handler=webdataset.warn_and_continue))
    assert (theirs[0]["jpg"], theirs[0]["txt"]) == (b"A", b"caption of B"), "webdataset: A's picture, B's caption"
    assert by_us(tmp_path / "*.tar", tmp_path / "cache") == [("k", b"B", b"caption of B")]


def test_2_a_cut_between_members_is_noticed(tmp_path: Path) -> None:
    path = raw_tar(tmp_path / "0.tar", [(f"{n}.{kind}", kind.encode()) for n in range(3) for kind in ("jpg", "txt")])
    cut(path, member=3)
    theirs = list(by_webdataset(path))
    assert [("jpg" in sample, "txt" in sample) for sample in theirs] == [(True, True), (True, False)], "half a sample"
    assert by_us(path, tmp_path / "cache") == [("0", b"jpg", b"txt")]
    [(shard, reason)] = open_table(str(path), "data.pairs", Stream.PAIRS, str(tmp_path / "cache")).notes["damage"]
    assert shard == str(path) and "cut at byte" in reason


def test_3_bad_pictures_cost_no_sleep(tmp_path: Path) -> None:
    samples = [{"__key__": str(n), "png": b"junk" if n < 4 else picture(n)} for n in range(12)]
    path = write_tar(tmp_path / "0.tar", samples)
    slept: list[float] = []
    with mock.patch("time.sleep", slept.append), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = webdataset.WebDataset([str(path)], shardshuffle=False)
        assert len(list(pipeline.decode("pil", handler=webdataset.warn_and_continue))) == 8
    assert sum(slept) >= 4 * 0.5, "webdataset: half a second for each"
    stream = images(path, tmp_path / "cache")
    with mock.patch("time.sleep", lambda _: pytest.fail("slept")):
        assert sum(len(stream.read(position).faults) for position in range(12)) >= 4


def test_4_members_that_are_not_adjacent_are_joined(tmp_path: Path) -> None:
    path = raw_tar(tmp_path / "0.tar", [("a.jpg", b"A"), ("b.jpg", b"B"), ("a.txt", b"a"), ("b.txt", b"b")])
    assert [len(sample.keys() & {"jpg", "txt"}) for sample in by_webdataset(path)] == [1] * 4, "webdataset: four halves"
    assert by_us(path, tmp_path / "cache") == [("a", b"A", b"a"), ("b", b"B", b"b")]


def test_5_keys_may_hold_dots(tmp_path: Path) -> None:
    names = ("img.0001.final", "img.0002.final")
    path = raw_tar(tmp_path / "0.tar", [(f"{n}.{kind}", n.encode()) for n in names for kind in ("jpg", "txt")])
    assert [sample["__key__"] for sample in by_webdataset(path)] == ["img"], "webdataset: one sample, two pictures"
    assert by_us(path, tmp_path / "cache") == [(name, name.encode(), name.encode()) for name in names]


def test_6_a_missing_shard_is_named_or_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3_dist.data.reader.PAUSES", ())
    for number in range(3):
        image_tar(tmp_path / f"{number}.tar", 4, seed=10 * number)
    pattern, stream = tmp_path / "{0..2}.tar", images(tmp_path / "{0..2}.tar", tmp_path / "cache")
    (tmp_path / "1.tar").unlink()
    paths = [tmp_path / f"{number}.tar" for number in range(3)]
    with pytest.raises(FileNotFoundError):
        list(by_webdataset(*paths))
    with mock.patch("time.sleep"):
        assert len(list(by_webdataset(*paths, handler=webdataset.warn_and_continue))) == 8, "skipped, recorded nowhere"
    with pytest.raises(ValueError, match="data.images: no file matches .*1.tar"):
        images(pattern, tmp_path / "cache")
    samples = [stream.read(position) for position in range(12)]  # It was there when the run started.
    faults = {(Path(fault.shard).name, fault.reason) for sample in samples for fault in sample.faults}
    assert faults == {("1.tar", "unreadable shard: No such file or directory")}


def test_7_the_order_is_a_function_of_the_seed(tmp_path: Path) -> None:
    path = image_tar(tmp_path / "0.tar", 30)

    def shuffled(pid: int) -> list[str]:
        with mock.patch.object(os, "getpid", lambda: pid), mock.patch.object(time, "time", lambda: float(pid)):
            pipeline = webdataset.WebDataset([str(path)], shardshuffle=False).shuffle(30)
            return [sample["__key__"] for sample in pipeline]

    assert shuffled(1) != shuffled(2), "webdataset: an order by time and process"
    one, other = images(path, tmp_path / "cache"), images(path, tmp_path / "cache")
    with mock.patch.object(os, "getpid", lambda: 1), mock.patch.object(time, "time", lambda: 1.0):
        first = [one.read(position).index for position in range(60)]
    assert [other.read(position).index for position in range(60)] == first
    assert [images(path, tmp_path / "cache").read(position).index for position in range(17, 60)] == first[17:]


def test_8_every_rank_gets_equally_many_samples(tmp_path: Path) -> None:
    paths = [image_tar(tmp_path / "0.tar", 5), image_tar(tmp_path / "1.tar", 2, seed=9)]
    theirs = []
    for rank in range(2):
        with mock.patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": "2"}):
            theirs.append(len(list(by_webdataset(*paths, nodesplitter=webdataset.split_by_node))))
    assert theirs == [5, 2], "webdataset: one rank ends while the other waits for it in all-reduce"
    stream = images(tmp_path / "*.tar", tmp_path / "cache")
    # A step of four samples over two ranks: rank r reads positions 2r and 2r + 1 of each step, without end.
    ours = [[stream.read(4 * step + 2 * rank + place) for step in range(7) for place in range(2)] for rank in range(2)]
    assert [len(samples) for samples in ours] == [14, 14]
    assert sorted(sample.index for samples in ours for sample in samples) == sorted([*range(7)] * 4)
