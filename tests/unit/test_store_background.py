"""Checkpoints are written while the training goes on; what goes wrong there is told at the next step."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint import snapshot
from beit3_dist.checkpoint.files import write_hashed
from beit3_dist.checkpoint.find import damaged, find
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.checkpoint.store import SavingFailed, Store
from beit3_dist.parallel.mesh import Groups
from tests.parallel.workers import run_workers
from tests.unit.small_checkpoints import MODEL, STATE, begin, load, open_store, pieces, save
from tests.unit.small_checkpoints import one_process as one_process

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that writes shards only while the event is set."""
    works, write = threading.Event(), snapshot.write_hashed

    def wait_and_write(*arguments: Any) -> dict[str, Any]:
        assert works.wait(30)
        return write(*arguments)

    monkeypatch.setattr(snapshot, "write_hashed", wait_and_write)
    yield works
    works.set()


def finish_by_checks(to: Store, path: Path) -> None:
    """As a training that takes steps meanwhile."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        to.check()
        time.sleep(0.005)


def test_the_training_goes_on_while_the_disk_writes(tmp_path: Path, disk: threading.Event) -> None:
    """What it changes after `save` is not in the checkpoint."""
    to, held = open_store(tmp_path), pieces(0, 1)
    to.save(held, STATE, MODEL, "out: x\n", {})
    for piece in held:
        for values in piece.tensors.values():
            values.fill_(-1)
    for _ in range(3):
        to.check()
    assert find("auto", tmp_path) is None and not (tmp_path / "latest").exists()
    disk.set()
    finish_by_checks(to, tmp_path / "step_0000007")
    to.wait()
    load(tmp_path / "step_0000007")


def test_one_at_a_time(tmp_path: Path, disk: threading.Event) -> None:
    """A second save waits for the first, whose memory it uses again."""
    to = open_store(tmp_path)
    begin(to, step=2)
    threading.Timer(0.2, disk.set).start()
    started = time.monotonic()
    begin(to, step=4)
    assert time.monotonic() - started > 0.1
    assert (tmp_path / "latest").read_text() == "step_0000002\n" and damaged(tmp_path / "step_0000002") == ""
    load(tmp_path / "step_0000002")
    to.wait()
    load(tmp_path / "step_0000004")


def test_the_pause_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        save(tmp_path)
    (message,) = caplog.messages
    assert "step_0000007" in message and "MB saved; the training stood still for 0." in message


def test_an_error_surfaces_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says which file and why; the former checkpoint and what the training holds are as they were."""
    former = save(tmp_path, step=2)
    to, held = open_store(tmp_path), pieces(0, 1)

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(snapshot, "write_hashed", full)
        to.save(held, STATE, MODEL, "", {})
        with pytest.raises(SavingFailed, match=r"step 7 .*rank 0: .*shard_00000.safetensors: No space left") as failure:
            to.wait()
    assert "\n" not in str(failure.value) and str(former) in str(failure.value)
    assert find("auto", tmp_path) == former and (tmp_path / "latest").read_text() == "step_0000002\n"
    assert not list(tmp_path.glob("*.partial")), "the half checkpoint takes room"
    assert all(torch.equal(a.tensors[""], b.tensors[""]) for a, b in zip(held, pieces(0, 1), strict=True))
    to.check()  # told once
    begin(to, step=8)
    to.wait()
    load(tmp_path / "step_0000008")


def test_an_error_of_the_last_files_surfaces_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, step=9_999_999)
    former = save(tmp_path, step=10_000_000)
    to = open_store(tmp_path)

    def break_down(path: Path, parts: Any) -> dict[str, Any]:
        if path.name == "manifest.json":
            raise OSError(errno.EIO, "Input/output error")
        return write_hashed(path, parts)

    monkeypatch.setattr("beit3_dist.checkpoint.store.write_hashed", break_down)
    begin(to, step=10_000_001)
    with pytest.raises(SavingFailed, match=r"rank 0: .*step_10000001.partial/.*: Input/output error") as failure:
        to.wait()
    assert find("auto", tmp_path) == former and f"the last whole one is {former}:" in str(failure.value)


def fail_on_the_second(groups: Groups, folder: str) -> list[str]:
    """The second rank's disk breaks at the second checkpoint."""
    mesh, to, messages = groups.mesh, open_store(Path(folder)), []
    write = snapshot.write_hashed

    def break_down(path: Path, parts: Any) -> dict[str, Any]:
        if mesh.rank == 1 and "step_0000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, parts)

    snapshot.write_hashed = break_down
    for step in range(1, 7):
        try:
            if step % 2:
                to.check()
                time.sleep(0.05 * mesh.rank)
            else:
                begin(to, step, mesh.rank, mesh.world)
        except SavingFailed as failure:
            messages.append(f"{step}: {failure}")
    to.wait()
    return messages


def test_all_ranks_learn_of_one_ranks_error_at_the_same_step(tmp_path: Path) -> None:
    first, second = run_workers(2, fail_on_the_second, str(tmp_path))
    assert first == second and len(first) == 1
    assert first[0].startswith("5: ") or first[0].startswith("6: ")
    assert "rank 1: " in first[0] and "shard_00001.safetensors: No space left" in first[0]
    newest = "step_0000006" if first[0].startswith("5") else "step_0000002"  # a save that finds an error saves nothing
    assert find("auto", tmp_path) == tmp_path / newest and len(read_weights(tmp_path / newest)) == 3


EXITING = """
import sys, tempfile, threading
from pathlib import Path
import torch
import torch.distributed as dist
from beit3_dist.checkpoint import snapshot
from tests.unit.small_checkpoints import begin, open_store, save

dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
save(Path(sys.argv[1]), step=2)
write, begun = snapshot.write_hashed, threading.Event()

def slowly(path, parts):
    begun.set()
    threading.Event().wait(0.02)
    return write(path, [bytes(1 << 28), *parts])

snapshot.write_hashed = slowly
begin(open_store(Path(sys.argv[1])), step=4)
begun.wait()
print("the end")
"""


@pytest.mark.slow
def test_the_interpreter_may_exit_while_a_thread_writes(tmp_path: Path) -> None:
    """As after an exception: nothing hangs or crashes, and a checkpoint that the ranks have not agreed on is none."""
    command = [sys.executable, "-c", EXITING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300)
    assert done.returncode == 0 and done.stdout == "the end\n", done.stderr
    assert find("auto", tmp_path) == tmp_path / "step_0000002"
    load(tmp_path / "step_0000002")
