"""Storage that fails for a while costs no samples; storage that fails for good costs those of its shard."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from beit3_dist.data import reader as reader_module
from beit3_dist.data.faults import BadSample
from beit3_dist.data.index import open_table
from beit3_dist.data.order import Stream
from beit3_dist.data.reader import PAUSES, ShardReader
from tests.unit.tar_fixtures import image_tar

Opened = tuple[ShardReader, tuple[int, int, int]]


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, which take no time."""
    pauses: list[float] = []
    monkeypatch.setattr(reader_module, "sleep", pauses.append)
    return pauses


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """A reader that has read its shard before, and a place in it."""
    image_tar(tmp_path / "a.tar", 2)
    table = open_table(str(tmp_path / "a.tar"), "data.images", Stream.IMAGES, str(tmp_path / "cache"))
    offset, size = map(int, table.rows[1]["image"])
    reader, place = ShardReader(table), (0, offset, size)
    assert reader.read(*place)[:4] == b"\x89PNG"
    return reader, place


def failing(code: int, fails: Callable[[int], bool]) -> Callable[[int, int, int], bytes]:
    """os.pread that fails for the descriptors of which `fails` says so."""
    pread = os.pread

    def read(file: int, size: int, offset: int) -> bytes:
        if fails(file):
            raise OSError(code, os.strerror(code))
        return pread(file, size, offset)

    return read


def test_a_void_descriptor_is_replaced(opened: Opened, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: what was opened before a failover is stale for ever, and the path is as good as ever."""
    reader, place = opened
    files, void, opener = len(os.listdir("/proc/self/fd")), {reader.files[0]}, os.open

    def anew(path: str, flags: int) -> int:
        void.clear()  # a new file, though it may get the old number
        return opener(path, flags)

    monkeypatch.setattr(os, "pread", failing(errno.ESTALE, void.__contains__))
    monkeypatch.setattr(os, "open", anew)
    assert reader.read(*place)[:4] == b"\x89PNG"
    assert slept == [PAUSES[0]] and len(reader.files) == 1
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == files


def test_an_outage_costs_time_and_no_sample(
    opened: Opened, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, place = opened
    monkeypatch.setattr(os, "pread", failing(errno.EIO, lambda file: len(slept) < len(PAUSES)))
    assert reader.read(*place)[:4] == b"\x89PNG" and slept == list(PAUSES)


def test_a_shard_that_was_replaced_is_named_and_not_its_samples_blamed(
    opened: Opened, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, place = opened
    path = Path(reader.table.files[0])
    shutil.copyfile(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    monkeypatch.setattr(os, "pread", failing(errno.ESTALE, lambda file: True))
    with pytest.raises(RuntimeError, match="a.tar changed since it was indexed"):
        reader.read(*place)


@pytest.mark.timeout(60)
def test_a_fifo_in_place_of_a_shard_is_not_waited_for(opened: Opened) -> None:
    reader, place = opened
    path = Path(reader.table.files[0])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RuntimeError, match="a.tar changed since it was indexed"):
        ShardReader(reader.table).read(*place)


def test_a_lost_shard_is_waited_for_once(opened: Opened, slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, place = opened
    broken = [True]
    monkeypatch.setattr(os, "pread", failing(errno.EIO, lambda file: broken[0]))
    for _ in range(3):
        with pytest.raises(BadSample, match="unreadable shard: Input/output error"):
            reader.read(*place)
    assert slept == list(PAUSES)
    broken[0] = False
    assert reader.read(*place)[:4] == b"\x89PNG", "it is back"
    broken[0] = True
    with pytest.raises(BadSample):
        reader.read(*place)
    assert slept == [*PAUSES, *PAUSES]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_this_machine_lacks_is_no_bad_sample(
    code: int, opened: Opened, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, place = opened
    monkeypatch.setattr(os, "pread", failing(code, lambda file: True))
    with pytest.raises(OSError, match=os.strerror(code)):
        reader.read(*place)
    assert slept == []
