"""A run that is killed goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from beit3_dist.checkpoint.read import read_weights
from beit3_dist.config import CheckpointConfig, ParallelConfig
from tests.equality import assert_close
from tests.integration.runs import metrics, reproducible, run_config, train, write_recipe
from tests.parallel.workers import free_port, run_workers

REPOSITORY = Path(__file__).parents[2]


def launch(recipe: Path, *overrides: str) -> subprocess.Popen:
    """The README's command, with two processes, in a process group of its own."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", "2", "--master_port",
               str(free_port()), "launchers/pretrain.py", "--config", str(recipe), *overrides]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(tmp_path: Path) -> None:
    """Under the deepspeed launcher, ZeRO-3 on two ranks: SIGKILL to all processes between two checkpoints."""
    config = run_config(tmp_path)
    undisturbed, disturbed = str(tmp_path / "undisturbed"), str(tmp_path / "disturbed")
    recipe = write_recipe(config, tmp_path / "recipe.yaml")

    process = launch(recipe, "--out", undisturbed)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "samples/s" in output and "left" in output, "no progress line"

    process = launch(recipe, "--out", disturbed)
    log = Path(disturbed, "metrics.jsonl")
    deadline = time.monotonic() + 240
    while not log.exists() or len(log.read_bytes().splitlines()) < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = len(log.read_bytes().splitlines())
    assert done < config.steps, "the run ended before it was killed"
    with open(log, "a") as file:
        file.write('{"step": 9')  # what a crash of the machine can leave behind

    process = launch(recipe, "--out", disturbed, "--checkpoint.resume", "auto")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "going on after step" in output

    assert [record["step"] for record in metrics(disturbed)] == list(range(1, config.steps + 1))
    assert reproducible(disturbed) == reproducible(undisturbed)  # JSON keeps every bit of a float
    ours, reference = (read_weights(Path(out, "checkpoints", "step_0000012")) for out in (disturbed, undisturbed))
    assert all(torch.equal(ours[name], weight) for name, weight in reference.items())
    assert list(Path(disturbed).glob("metrics.tail-*.jsonl")), "the tail of the killed run is kept aside"


def test_goes_on_in_other_layouts(tmp_path: Path) -> None:
    """dp2 ZeRO-3 -> tp2 ZeRO-1 with sharded tokens -> one process -> tp2pp2 ZeRO-3 -> dp2: the losses within fp32."""
    config = run_config(tmp_path)
    whole = replace(config, out=str(tmp_path / "whole"))
    assert run_workers(2, train, whole) == ["", ""]
    reference = metrics(whole.out)
    layouts = [
        (2, ParallelConfig(zero_stage=1, tensor=2, sequence=True)),
        (1, ParallelConfig(zero_stage=0)),
        (4, ParallelConfig(zero_stage=3, tensor=2, pipeline=2)),
        (2, ParallelConfig(zero_stage=2)),
    ]
    start, source = 4, Path(whole.out, "checkpoints", "step_0000004")
    for number, (world, parallel) in enumerate(layouts):
        other = replace(
            config,
            out=str(tmp_path / f"changed-{number}"),
            parallel=parallel,
            checkpoint=CheckpointConfig(every=start + 2, resume=str(source)),
        )
        assert set(run_workers(world, train, other, tensor=parallel.tensor, pipeline=parallel.pipeline)) == {""}
        ours = metrics(other.out)
        assert [r["sample_hash"] for r in ours] == [r["sample_hash"] for r in reference[start:]]
        for name in ("loss", "loss_image", "loss_text", "loss_pair_image", "loss_pair_text", "grad_norm"):
            changed, expected = (torch.tensor([r[name] for r in records]) for records in (ours, reference[start:]))
            assert_close(changed, expected, f"{name} of {parallel}")
        start, source = start + 2, Path(other.out, "checkpoints", f"step_{start + 2:07d}")
