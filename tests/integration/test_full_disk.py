"""A disk that fills up while a run saves: one clear line, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from beit3_dist.checkpoint.find import find, read_manifest
from beit3_dist.config import CheckpointConfig, RunConfig
from beit3_dist.leaving import ExitCode
from tests.integration.runs import metrics, reproducible, run_config, train, write_recipe
from tests.launching import launch
from tests.parallel.workers import run_workers


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 64 KiB."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        reason = f"no small file system for the test (user {os.getuid()}): {mounted.stderr.strip()}"
        print(reason)
        pytest.skip(reason)
    yield folder
    subprocess.run(["umount", folder], check=True)


def resize(folder: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_harms_nothing(tmp_path: Path, small_disk: Path) -> None:
    """Two ranks, room for one checkpoint and a half. The run goes on, bit for bit, once there is room."""
    config = run_config(tmp_path, steps=6, checkpoint=CheckpointConfig(every=2, keep=0, resume="auto"))
    undisturbed = replace(config, out=str(tmp_path / "undisturbed"))
    assert run_workers(2, train, undisturbed) == ["", ""]
    size = sum(bytes for bytes, _ in read_manifest(find("auto", tmp_path / "undisturbed" / "checkpoints")).values())
    resize(small_disk, 3 * size // 2 // 1024)

    config = replace(config, out=str(small_disk.parent))
    first, second = run_workers(2, train, config)
    assert first == second and "\n" not in first
    for part in ("the checkpoint of step 4 could not be written", "No space left on device", "make room", "shard_0000"):
        assert part in first, first
    assert [path.name for path in sorted(small_disk.iterdir())] == ["latest", "step_0000002"]
    assert (small_disk / "latest").read_text() == "step_0000002\n"
    taken = len(metrics(config.out))
    assert 4 <= taken <= 6, "the error is told at the next step, or the next save"

    resize(small_disk, 8 * size // 1024)
    assert run_workers(2, train, config) == ["", ""]
    assert [record["step"] for record in metrics(config.out)] == list(range(1, 7))
    assert reproducible(config.out) == reproducible(undisturbed.out)
    assert digests(config) == digests(undisturbed)


def digests(config: RunConfig) -> list[str]:
    """Of all weights and moments at the end."""
    manifest = read_manifest(Path(config.out, "checkpoints", "step_0000006"))
    return [digest for name, (_, digest) in manifest.items() if name.startswith("shard_")]


@pytest.mark.slow
def test_a_full_disk_under_the_records_stops_all_processes_with_one_line(tmp_path: Path) -> None:
    """Only the first process writes them; the other one learns of it, and ends with the same code."""
    recipe = write_recipe(run_config(tmp_path), tmp_path / "recipe.yaml")
    metrics_file = tmp_path / "run" / "metrics.jsonl"
    metrics_file.parent.mkdir()
    metrics_file.symlink_to("/dev/full")
    ended = launch("pretrain", "--config", str(recipe), "--checkpoint.resume", "auto", processes=2)
    assert ended.returncodes == 2 * [ExitCode.STOPPED] and "Traceback" not in ended.stderr, ended.stderr
    told = f"error: {metrics_file}: No space left on device: make room, then go on with --checkpoint.resume auto"
    assert ended.stderr.count(told) == 1, ended.stderr
