"""How launchers end: a mistake of one process, an error, Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import NoReturn

import pytest
from torch.utils.data import Dataset

from beit3_dist.command_line import FAILED, STOPPED
from beit3_dist.data.loader import loader
from beit3_dist.training import launch as module
from beit3_dist.training.launch import launch
from beit3_dist.training.preemption import PREEMPTED, SIGNALS, nothing_to_save
from beit3_dist.training.resilience import RunStopped
from beit3_dist.training.run_lock import FolderInUse


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """`launch` gives the package's log a handler, as programs want it."""
    log = logging.getLogger("beit3_dist")
    level, handlers = log.level, log.handlers[:]
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.mark.parametrize("rank", [0, 3])
def test_a_mistake_is_told_by_whoever_meets_it(
    rank: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first process tells it at once; another one when the first has had time to meet it as well."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("time.sleep", waited.append)

    def prepare() -> NoReturn:
        raise FileNotFoundError("data.images: /data is\nnot there")

    with pytest.raises(SystemExit) as exit_:
        launch("program", prepare, lambda _: pytest.fail("the run was started"))
    where = f"rank {rank} on {socket.gethostname()}: " if rank else ""
    assert exit_.value.code == 2
    assert capfd.readouterr().err == f"program: {where}error: data.images: /data is not there\n"
    assert waited == ([module.WAIT_S] if rank else [])


def test_a_folder_in_use_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: None)

    def train(_: None) -> NoReturn:
        raise FolderInUse("out: /runs/giant is in use by job 4711")

    with pytest.raises(SystemExit) as exit_:
        launch("program", lambda: None, train)
    assert exit_.value.code == 2
    assert capfd.readouterr().err == "program: error: out: /runs/giant is in use by job 4711\n"


class Numbers(Dataset):
    def __getitem__(self, number: int) -> int:
        return number


def failing_run(kind: str) -> None:
    """One process with a loader process, which the traceback's frames keep alive."""

    def train(_: None) -> None:
        batches = iter(loader(Numbers(), range(1_000_000), workers=1, prefetch=2, pin=False))
        next(batches)
        if kind == "error":
            raise RuntimeError("an error that nobody expects")
        if kind == "stop":
            raise RunStopped("too many bad samples")
        os.kill(os.getpid(), signal.SIGINT)
        next(batches)

    launch("program", lambda: None, train)


@pytest.mark.parametrize(("kind", "code"), [("error", FAILED), ("interrupt", module.INTERRUPTED), ("stop", STOPPED)])
def test_a_run_of_one_process_ends_after_an_error_an_interrupt_and_by_itself(kind: str, code: int) -> None:
    result = subprocess.run([sys.executable, __file__, kind], text=True, capture_output=True, timeout=300)
    assert result.returncode == code, result.stderr
    said, _, _ = result.stderr.partition("/multiprocessing/resource_tracker.py")  # of semaphores, which it clears away
    if kind == "error":
        assert said.count("Traceback") == 1 and "\nRuntimeError: an error that nobody expects\n" in said
    else:
        words = {"interrupt": "program: interrupted\n", "stop": "program: error: too many bad samples\n"}
        assert said.startswith(words[kind]) and "Traceback" not in said


def preempted_run(kind: str) -> None:
    """Under launchers/slurm/shield.py, which holds back the signals, and so one that comes while torch is imported."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if kind == "earlier":
        os.kill(os.getpid(), signal.SIGUSR1)

    def prepare() -> None:
        with suppress(Exception):  # as readers of broken files do
            os.kill(os.getpid(), signal.SIGTERM)

    def train(_: None) -> None:
        print("trained", file=sys.stderr)

    launch("program", prepare, train)


@pytest.mark.parametrize("kind", ["earlier", "meanwhile"])
def test_a_process_that_prepares_goes_when_it_is_asked(kind: str) -> None:
    """Hours of indexing under Slurm: the time limit must find a job that is back in the queue."""
    result = subprocess.run([sys.executable, __file__, kind], text=True, capture_output=True, timeout=300)
    assert result.returncode == PREEMPTED, result.stderr
    assert result.stderr.endswith("program: asked to go before the training has begun\n")


def test_after_the_preparation_signals_are_as_before() -> None:
    """What comes between it and the training's first moment waits, where it has waited before."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with suppress(OSError), nothing_to_save("program"):
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)
            raise OSError("a mistake: the process waits for the first one's line")
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask | {signal.SIGUSR1}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have background jobs ignore
    (failing_run if sys.argv[1] in ("error", "interrupt", "stop") else preempted_run)(sys.argv[1])
