"""How launchers end: a mistake of one process, an error, Ctrl-C."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist
from torch.utils.data import Dataset

from beit3_dist import launched, leaving
from beit3_dist.data.faults import StreamFailed
from beit3_dist.data.loader import WorkerKilled, loader
from beit3_dist.leaving import SIGNALS, ExitCode, leave_when_asked, when_asked
from beit3_dist.looking import ToldElsewhere
from beit3_dist.run import launch as module
from beit3_dist.run.endings import ENDINGS, STARTED_AGAIN, FolderInUse, RunStopped, StorageLost, ending_of
from beit3_dist.run.launch import launch

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "resume.md").read_text()
SBATCH = (REPOSITORY / "launchers" / "slurm" / "pretrain.sbatch").read_text()


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
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
    monkeypatch.setattr(launched, "_place", launched.ProcessPlace(rank, 4, rank, 4))
    monkeypatch.setattr("time.sleep", waited.append)

    def prepare() -> NoReturn:
        raise FileNotFoundError("data.images: /data is\nnot there")

    with pytest.raises(SystemExit) as exit_:
        launch("program", prepare, lambda _: pytest.fail("the run was started"))
    where = f"rank {rank} on {socket.gethostname()}: " if rank else ""
    assert exit_.value.code == 2
    assert capfd.readouterr().err == f"program: {where}error: data.images: /data is not there\n"
    assert waited == ([module.MISTAKE_WAIT_S] if rank else [])


def test_who_waits_for_the_one_that_looks_is_silent_and_ends_later(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its launcher would end the one that is about to speak."""
    waited: list[float] = []
    monkeypatch.setattr(launched, "_place", launched.ProcessPlace(3, 4, 3, 4))
    monkeypatch.setattr("time.sleep", waited.append)

    def prepare() -> NoReturn:
        raise ToldElsewhere("run/1")

    with pytest.raises(SystemExit) as exit_:
        launch("program", prepare, lambda _: pytest.fail("the run was started"))
    assert exit_.value.code == ExitCode.MISTAKE and capfd.readouterr().err == ""
    assert sum(waited) > module.MISTAKE_WAIT_S


def test_a_folder_in_use_is_a_mistake(capfd: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize(
    ("kind", "code"), [("error", ExitCode.FAILED), ("interrupt", ExitCode.INTERRUPTED), ("stop", ExitCode.STOPPED)]
)
def test_a_run_of_one_process_ends_after_an_error_an_interrupt_and_by_itself(kind: str, code: int) -> None:
    result = subprocess.run([sys.executable, __file__, kind], text=True, capture_output=True, timeout=300)
    assert result.returncode == code, result.stderr
    said, _, _ = result.stderr.partition("/multiprocessing/resource_tracker.py")  # of semaphores, which it clears away
    if kind == "error":
        assert said.count("Traceback") == 1 and "\nRuntimeError: an error that nobody expects\n" in said
    else:
        words = {"interrupt": "program: interrupted\n", "stop": "program: error: too many bad samples\n"}
        assert said.startswith(words[kind]) and "Traceback" not in said


FULL = OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")


def behind(error: OSError) -> RuntimeError:
    """What torch makes of a write that fails."""
    try:
        raise RuntimeError("unexpected position") from error
    except RuntimeError as failure:
        return failure


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (FULL, "program: error: run/metrics.jsonl: No space left on device: make room, then", ExitCode.STOPPED),
        (behind(OSError(errno.EDQUOT, "Disk quota exceeded", "a")), "program: error: a: Disk quota", ExitCode.STOPPED),
        (WorkerKilled("loader process 7 was killed by SIGKILL"), "program: error: loader process 7", ExitCode.FAILED),
        (StreamFailed("example a.jpg cannot be evaluated"), "program: error: example a.jpg", ExitCode.STOPPED),
        (StorageLost("100 bad samples in a row"), "program: error: 100 bad", ExitCode.FAILED),
        (OSError(errno.EIO, "Input/output error", "a"), "Traceback", ExitCode.FAILED),
    ],
    ids=["full disk", "quota", "killed worker", "validation example", "lost storage", "another error"],
)
def test_what_tells_all_is_told_in_one_line_with_its_exit_code(error: Exception, said: str, code: int) -> None:
    try:
        raise error
    except Exception as caught:
        ending, told = ending_of(caught)
        words = module._last_words("program", ending, told)
    assert words.startswith(said) and ending.exit_code == code
    assert ("\n" in words) == (said == "Traceback")


def test_every_way_in_which_a_run_ends_is_in_the_pages_and_in_the_batch_script() -> None:
    """With its exit code, and a job of Slurm's is started again where that is worth it."""
    words = PAGE.partition("Exit codes: ")[2].partition(".")[0]
    assert {0, *map(int, re.findall(r"(\d+) [a-zC]", words))} == {*ExitCode}
    assert {ending.exit_code for ending in ENDINGS} == {*ExitCode}
    codes = re.findall(r"(\w+)=(\d+)", SBATCH.partition(" # exit codes of")[0].rpartition("\n")[2])
    numbers = {"0": 0, **{f'"${name}"': int(code) for name, code in codes}}
    ((ends, requeued),) = re.findall(r"^(0 \| .*)\) ;;\n(.*)\) requeue ;;$", SBATCH, re.M)
    assert {numbers[name] for name in ends.split(" | ")} == {*ExitCode} - {*STARTED_AGAIN, ExitCode.INTERRUPTED}
    assert numbers[requeued] in STARTED_AGAIN


def test_a_run_that_stops_itself_leaves_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's end may abort in the threads of one that is left."""
    calls: list[str] = []
    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "barrier", lambda: calls.append("met"))
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(module, "ends_by_itself", threading.Event())

    def train(_: None) -> NoReturn:
        raise RunStopped("too many bad samples")

    with pytest.raises(SystemExit) as exit_:
        launch("program", lambda: None, train)
    assert exit_.value.code == ExitCode.STOPPED and calls == ["met", "destroyed"]


def saying_run(kind: str) -> None:
    """Says more than a buffer holds."""

    def train(_: None) -> None:
        for step in range(999):
            print(f"step {step}/999  loss 10.3", flush=True)
        if kind == "says and stops":
            raise RunStopped("too many bad samples")
        if kind == "says and fails":
            raise RuntimeError("an error that nobody expects")

    launch("program", lambda: None, train)


ENDS = {
    "says": 0,
    "says and stops": ExitCode.STOPPED,
    "says and fails": ExitCode.FAILED,
    "earlier": ExitCode.PREEMPTED,
}


def all_of_them(_: str) -> None:
    """Each run of ENDS in a fork, which ends as a program does; their exit codes in a file."""
    forks: dict[int, str] = {}
    for kind in ENDS:
        if not (process := os.fork()):
            RUNS[kind](kind)
            return
        forks[process] = kind
    codes = {kind: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process, kind in forks.items()}
    Path(sys.argv[2]).write_text(json.dumps(codes))


@pytest.mark.slow
@pytest.mark.parametrize("how", [">/dev/full 2>&1", ">&- 2>&-", "2>&1 | true"])
def test_a_terminal_that_takes_nothing_changes_no_exit_code(how: str, tmp_path: Path) -> None:
    """The disk of its log is full, it was never there, or its reader has gone."""
    codes = tmp_path / "codes.json"
    command = shlex.join([sys.executable, __file__, "all", str(codes)])
    subprocess.run(["bash", "-c", f"{command} {how}"], timeout=300)
    assert json.loads(codes.read_text()) == ENDS


def preempted_run(kind: str) -> None:
    """Under launchers/slurm/shield.py, which holds back the signals, and so one that comes while torch is imported."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if kind == "earlier":
        os.kill(os.getpid(), signal.SIGUSR1)

    def prepare() -> None:
        with suppress(Exception):  # as readers of broken files do
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(120)  # hours

    def train(_: None) -> None:
        print("trained", file=sys.stderr)

    launch("program", prepare, train)


@pytest.mark.parametrize("kind", ["earlier", "meanwhile"])
def test_a_process_that_prepares_goes_when_it_is_asked(kind: str) -> None:
    """Hours of indexing under Slurm: the time limit must find a job that is back in the queue."""
    result = subprocess.run([sys.executable, __file__, kind], text=True, capture_output=True, timeout=300)
    assert result.returncode == ExitCode.PREEMPTED, result.stderr
    assert result.stderr.endswith("program: asked to go before the training has begun\n")


def waiting_run(kind: str) -> None:
    """Waits where nobody can save yet: in Python, and in C, where no handler of a signal is run."""
    here = threading.main_thread().ident

    def meet(_: None) -> None:
        threading.Timer(1.0, lambda: signal.pthread_kill(here or 0, signal.SIGTERM)).start()
        if kind == "lock":
            threading.Lock().acquire()
            threading.Event().wait()
        dist.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timedelta(minutes=10))

    launch("program", lambda: None, meet)


@pytest.mark.parametrize("kind", ["lock", "store"])
def test_between_preparation_and_training_a_process_goes_as_well(kind: str) -> None:
    result = subprocess.run([sys.executable, __file__, kind], text=True, capture_output=True, timeout=300)
    assert result.returncode == ExitCode.PREEMPTED, result.stderr
    assert result.stderr.endswith("program: asked to go before the training has begun\n")


def pooling_run(_: str) -> None:
    """A pool ends its workers by the signal that asks a program to go; so does that of a second program here."""
    leave_when_asked("program")
    leaving._forget()
    leave_when_asked("program")
    for _ in range(20):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.map(abs, range(8))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), "signals come through again after a fork"
    print("well")


def test_the_end_of_a_pool_ends_its_workers_alone() -> None:
    """Nothing of the signals of a process reaches the one that has forked it, and none passes it by."""
    result = subprocess.run([sys.executable, __file__, "pool"], text=True, capture_output=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "well\n", "")


def forking_run(_: str) -> None:
    """A run that has no program around it, as one from Python: what it forks is ended by a signal all the same."""
    when_asked(lambda number, frame: None, lambda: None)
    if not (child := os.fork()):
        time.sleep(60)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    print("well")


def test_a_signal_ends_what_a_run_from_python_has_forked() -> None:
    """Handlers outlive a fork; a pool of such a run would wait for its workers for ever."""
    result = subprocess.run([sys.executable, __file__, "fork"], text=True, capture_output=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "well\n", "")


RUNS = {
    **dict.fromkeys(("error", "interrupt", "stop"), failing_run),
    **dict.fromkeys(("says", "says and stops", "says and fails"), saying_run),
    **dict.fromkeys(("earlier", "meanwhile"), preempted_run),
    **dict.fromkeys(("lock", "store"), waiting_run),
    "pool": pooling_run,
    "fork": forking_run,
    "all": all_of_them,
}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have background jobs ignore
    RUNS[sys.argv[1]](sys.argv[1])
