"""One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from beit3_dist.config import CheckpointConfig, DataConfig, RunConfig
from beit3_dist.run import lock as run_lock
from beit3_dist.run.endings import FolderInUse, RunStopped
from beit3_dist.run.lock import RunLock
from beit3_dist.train import loop
from tests.unit.small_checkpoints import MODEL, save
from tests.unit.small_checkpoints import one_process as one_process

pytestmark = pytest.mark.usefixtures("one_process")

TAKE = "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
"""What another process does to have the lock; exit code 1 where it cannot."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    data = DataConfig(images="a.tar", texts="b.tar", pairs="c.tar")
    resume = CheckpointConfig(resume="auto")
    return RunConfig(out=str(tmp_path / "run"), data=data, image_tokenizer="i", text_tokenizer="t", checkpoint=resume)


@contextmanager
def other_run(out: str, holder: str) -> Iterator[subprocess.Popen]:
    """A process that has the lock of a folder, until it is killed."""
    Path(out).mkdir(exist_ok=True)
    say = f"; file.truncate(0); file.write({holder!r}); file.flush(); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", TAKE + say, f"{out}/run.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process
        process.kill()


def is_free(out: str) -> bool:
    return subprocess.run([sys.executable, "-c", TAKE, f"{out}/run.lock"], stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("holder", "words"),
    [
        ('{"job": "4711", "host": "node7", "pid": 5}\n', "in use by job 4711 on host node7:"),
        ('{"job": null, "host": "node7", "pid": 5}\n', "in use by process 5 on host node7:"),
        ('{"job', "in use by another run:"),  # that has the lock but not yet said so
    ],
)
def test_a_second_run_is_refused_until_the_first_is_dead(config: RunConfig, holder: str, words: str) -> None:
    with other_run(config.out, holder) as first:
        with pytest.raises(FolderInUse, match=words):
            RunLock(config, None)
        first.kill()
        first.wait()
        with RunLock(config, None):
            assert f'"pid": {os.getpid()}' in Path(config.out, "run.lock").read_text()


def test_a_requeued_job_waits_for_the_locks_of_a_node_that_has_died(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with other_run(config.out, "") as first:
        slept: list[float] = []
        monkeypatch.setattr(run_lock.time, "sleep", slept.append)
        with pytest.raises(FolderInUse, match="wait for its end"):
            RunLock(config, None)
        assert slept == [run_lock.LEASE_S] and "this job was put back into the queue" in caplog.text

        def server_notices(seconds: float) -> None:
            first.kill()
            first.wait()

        monkeypatch.setattr(run_lock.time, "sleep", server_notices)
        with RunLock(config, None):
            assert not is_free(config.out)


def test_a_forked_process_does_not_keep_the_folder(config: RunConfig) -> None:
    """Loader processes are forks, and outlive a run that is killed by some seconds."""
    reads, writes = os.pipe()
    with RunLock(config, None):
        child = os.fork()
        if child == 0:
            os.close(writes)
            os.read(reads, 1)
            os._exit(0)
        assert not is_free(config.out)
    assert is_free(config.out)
    os.close(writes)
    os.waitpid(child, 0)
    os.close(reads)


@pytest.mark.parametrize(("error", "free"), [(RunStopped("too many bad samples"), True), (RuntimeError(), False)])
def test_after_an_error_that_nobody_expects_it_is_held_to_the_end_of_the_process(
    config: RunConfig, error: RuntimeError, free: bool
) -> None:
    lock = RunLock(config, None)
    with pytest.raises(RuntimeError), lock:
        raise error
    assert is_free(config.out) is free
    lock._give_back()


def test_another_run_has_come_and_gone_since_the_checkpoint_was_found(config: RunConfig) -> None:
    config = replace(config, model=MODEL)
    found, since = (save(Path(config.out, "checkpoints"), step) for step in (4, 5))
    with pytest.raises(FolderInUse, match="out: another run has saved a checkpoint in .*: start it again"):
        RunLock(config, found)
    assert is_free(config.out)
    (since / "manifest.json").unlink()  # a damaged one is none
    with RunLock(config, found):
        assert not is_free(config.out)


def test_a_folder_that_cannot_be_made_is_named(config: RunConfig) -> None:
    Path(config.out).write_text("")
    with pytest.raises(FolderInUse, match=f"out: .*{config.out}"):
        RunLock(config, None)


def test_where_there_are_no_locks_it_says_so(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(*_: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", without)
    with caplog.at_level(logging.WARNING), RunLock(config, None):
        assert f"{config.out} is on a file system without locks" in caplog.text


def test_training_touches_nothing_of_a_folder_in_use(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = SimpleNamespace(mesh=None, config=config, checkpoint=None, state=None)
    monkeypatch.setattr(loop, "connect", lambda *_: None)
    with other_run(config.out, "{}"):
        with pytest.raises(FolderInUse):
            loop.train(job)
        assert [path.name for path in Path(config.out).iterdir()] == ["run.lock"]
