"""Cache files on disks that are full or have no locks, and what killed processes leave behind."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from beit3_dist.data.cache import ABANDONED_S, locked, write_whole


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process may have more than 64 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda file: np.save(file, np.zeros(1 << 20)), "the disk is full .*requested and .* written"),
        (lambda file: file.write(bytes(1 << 20)), "File too large"),
    ],
    ids=["numpy", "bytes"],
)
def test_a_full_disk_is_told_by_field_and_file(
    write: Callable[[BinaryIO], object], reason: str, tmp_path: Path, full_disk: None
) -> None:
    with pytest.raises(ValueError, match=rf"^data.cache: cannot write {tmp_path}/table.npy: {reason}.*; make room"):
        write_whole(tmp_path / "table.npy", write)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_told_and_an_input_that_is_gone_is_not_blamed_on_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--out: cannot write .*nowhere/a: No such file or directory"):
        write_whole(tmp_path / "nowhere" / "a", lambda file: file.write(b"1"), "--out")
    with pytest.raises(FileNotFoundError, match="shard.tar"):
        write_whole(tmp_path / "a", lambda file: (tmp_path / "shard.tar").read_bytes())


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """As root, `--out /dev/null` made a file of the machine's device."""
    target = tmp_path / "out"
    {"FIFO": os.mkfifo, "device": lambda path: path.symlink_to("/dev/null"), "folder": Path.mkdir}[kind](target)
    before = target.lstat()
    with pytest.raises(ValueError, match="--out: .*out is there and is no file: name another place"):
        write_whole(target, lambda file: file.write(b"1"), "--out")
    assert target.lstat() == before and list(tmp_path.iterdir()) == [target]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="^data.cache: cannot lock .*/locks/a: Function not implemented; name a"):
        with locked(tmp_path / "a"):
            pytest.fail("there is no lock")


def test_partial_files_of_killed_processes_go_with_the_next_lock(tmp_path: Path) -> None:
    old, new = tmp_path / "a.node7.1.partial", tmp_path / "b.node7.1.partial"
    for partial in (old, new):
        partial.write_bytes(b"half")
    os.utime(old, (0.0, time.time() - ABANDONED_S - 10))
    with locked(tmp_path / "c"):
        assert not old.exists() and new.exists(), "another node may still write the new one"


def test_equal_process_numbers_of_two_nodes_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    for host in ("node1", "node2"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        write_whole(tmp_path / "a", lambda file: names.append(file.name))
    assert len(set(names)) == 2
