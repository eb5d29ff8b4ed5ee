"""Runs of two processes that wait for data which never come: asked to go, and by themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from beit3_dist.config import RunConfig
from tests.integration.runs import REPOSITORY, run_config, write_recipe
from tests.launching import launch
from tests.parallel.workers import free_port

SECONDS = 30
"""The most that a process may take to go when it is asked, on a machine with much else to do."""


def start(config: RunConfig, folder: Path) -> subprocess.Popen[str]:
    """Two processes under torchrun."""
    recipe = write_recipe(config, folder / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
               str(free_port()), "launchers/pretrain.py", "--config", str(recipe)]  # fmt: skip
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_asked_to_go_while_a_command_hangs(workers: int, tmp_path: Path) -> None:
    """Only the last process is asked, and both go, while both wait; their commands end with them."""
    config = run_config(tmp_path)
    mark = tmp_path / "pids"
    script = f"pipe:sh -c 'echo $$ >> {mark}; exec sleep 600' {{0,1}}"
    config.data = replace(config.data, workers=workers, images=script, virtual_readers=2)
    process = start(replace(config, steps=3), tmp_path)
    while not mark.exists() or len(mark.read_text().split()) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    time.sleep(2)  # the model is built, and the first step waits
    trainers = [p for p in psutil.Process(process.pid).children() if "launchers/pretrain.py" in " ".join(p.cmdline())]
    last = max(trainers, key=lambda trainer: int(trainer.environ()["RANK"]))
    asked = time.monotonic()
    last.send_signal(signal.SIGTERM)
    psutil.wait_procs(trainers, timeout=4 * SECONDS)
    took_s = time.monotonic() - asked
    output, _ = process.communicate(timeout=120)
    assert took_s < SECONDS and "exitcode  : 75" in output, (took_s, output)
    assert output.count("Traceback") == 1, "torchrun has one of its own"
    deadline = time.monotonic() + SECONDS
    while any(psutil.pid_exists(int(pid)) for pid in mark.read_text().split()):
        assert time.monotonic() < deadline, "a command has outlived the run"
        time.sleep(0.1)


@pytest.mark.slow
def test_pictures_of_which_none_can_be_used_end_all_processes_with_3(tmp_path: Path) -> None:
    """With loader processes; the samples are written down."""
    config = run_config(tmp_path)
    config.data = replace(config.data, workers=1, max_pixels=1)
    ended = launch("pretrain", "--config", str(write_recipe(config, tmp_path / "recipe.yaml")), processes=2)
    assert "pretrain.py: error: 100 bad samples in a row in the stream of images" in ended.stderr, ended.stderr
    assert ended.returncodes == [3, 3] and "Traceback" not in ended.stderr, ended.stderr
    faults = [json.loads(line) for line in Path(config.out, "quarantine.jsonl").read_text().splitlines()]
    assert len(faults) >= 100 and {fault["step"] for fault in faults} == {1}
