"""How runs end under real launchers: an error in one process, a hanging step, a signal to go."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from beit3_dist.config import CheckpointConfig, DataConfig
from tests.integration.runs import (
    REPOSITORY,
    metrics,
    reproducible,
    run_config,
    start,
    train,
    wait_for_steps,
    write_recipe,
)
from tests.launching import launch
from tests.parallel.workers import free_port, run_workers

FAULTY = str(Path(__file__).parent / "faulty_pretrain.py")
SECONDS = 60
"""The most that the end of all processes may take on a machine with much else to do; idle it is three to four."""


def deepspeed(*arguments: str, fault: str) -> tuple[int, str, float]:
    """Exit code, output, and seconds from the fault to the end, of two processes under the deepspeed launcher."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port",
               str(free_port()), FAULTY, *arguments]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:  # fmt: skip
        started = psutil.Process(process.pid)
        family: list[psutil.Process] = []
        while process.poll() is None and len(family) < 3:  # the launcher and its two trainers
            family = started.children(recursive=True)
            time.sleep(0.5)
        output, _ = process.communicate(timeout=240)
    ended = time.time()
    assert not [child for child in family if child.is_running()], "a process has outlived the launcher"
    return process.returncode, output, ended


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ending")
    return write_recipe(run_config(folder), folder / "recipe.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process_ends_all_and_is_shown_last(rank: int, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, output, ended = deepspeed("--config", str(recipe), "--out", str(out), fault=f"raise:{rank}:5")
    assert code == 1
    assert ended - (out / "metrics.jsonl").stat().st_mtime < SECONDS, output
    ours = [line for line in output.splitlines() if "exits with return code" not in line and "INFO" not in line]
    assert ours[-2:] == [
        "RuntimeError: the injected error",
        f"pretrain.py: rank {rank} on {os.uname().nodename} is the first to fail, with the error above",
    ], output
    assert output.count("Traceback") == 1, "what follows from the first error must not be shown"
    other = (out / "logs" / f"rank{1 - rank:05d}.log").read_text()
    assert "another process has failed" in other or "this process failed" in other


@pytest.mark.slow
def test_a_hanging_step_is_ended_with_all_stacks(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    limit = ("--guards.step_timeout_s", "5")
    code, output, ended = deepspeed("--config", str(recipe), "--out", str(out), *limit, fault="hang:1:5")
    assert code == 1 and "step 5 has taken longer than guards.step_timeout_s=5" in output, output
    missing = r"has not come to \w+ \d+ of ranks 0, 1, in which rank 0 waits\. "
    assert re.search(f"Rank 1 on {re.escape(socket.gethostname())} {missing}", output), output
    assert ended - (out / "metrics.jsonl").stat().st_mtime < 5 + SECONDS, output
    hanging, waiting = ((out / "logs" / f"rank{rank:05d}.log").read_text() for rank in (1, 0))
    assert "in faulty_step" in hanging, "the stack shows where it hangs"
    assert "most recent call first" in waiting


@pytest.mark.slow
def test_torchrun_and_a_signal_to_go(tmp_path: Path) -> None:
    """Two nodes, each with a torchrun that passes SIGTERM on; Slurm would send it to the loader processes as well. Then
    on, to the same end."""
    config = run_config(tmp_path)
    config.data = DataConfig(**vars(config.data) | {"workers": 1})
    recipe = write_recipe(config, tmp_path / "recipe.yaml")
    undisturbed = run_config(tmp_path, out=str(tmp_path / "undisturbed"), checkpoint=CheckpointConfig(every=100))
    assert run_workers(2, train, undisturbed) == ["", ""]

    arguments = ["--config", str(recipe), "--checkpoint.every", "100", "--checkpoint.resume", "auto"]
    port = str(free_port())
    nodes = [
        start("-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "1",
              "--master_addr", "127.0.0.1", "--master_port", port, "launchers/pretrain.py", *arguments)
        for rank in "01"
    ]  # fmt: skip
    wait_for_steps(nodes[0], config.out, 3)
    for node in nodes:
        for child in psutil.Process(node.pid).children(recursive=True):
            child.send_signal(signal.SIGTERM)
    output, other = (node.communicate(timeout=120)[0] for node in nodes)
    done = len(metrics(config.out))
    assert 3 <= done < config.steps and f"asked to go: saved after step {done} of 12" in output, output
    assert "exitcode  : 75" in output and "exitcode  : 75" in other, output + other

    result = launch("pretrain", *arguments, processes=2)
    assert result.returncode == 0 and f"going on after step {done}" in result.stderr, result.stderr
    assert reproducible(config.out) == reproducible(undisturbed.out)
