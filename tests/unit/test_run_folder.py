"""What each process writes into the run folder, and when that is safe."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from beit3_dist.config import DataConfig, RunConfig
from beit3_dist.data.faults import Fault
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.computing import computed_by
from beit3_dist.run.folder import RunFolder


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """A run's processes log into its folder to their end."""
    log = logging.getLogger()
    handlers = log.handlers[:]
    yield
    log.handlers[:] = handlers


def run_folder(out: Path, step: int) -> RunFolder:
    data = DataConfig(images="a.tar", texts="b.tar", pairs="c.tar")
    config = RunConfig(out=str(out), data=data, image_tokenizer="i", text_tokenizer="t")
    return RunFolder(out, config, Mesh(0, 1, 0, 1, torch.device("cpu")), step)


@pytest.mark.parametrize(("step", "left"), [(0, [0]), (5, [0, 3, 0])])
def test_faults_of_before_the_first_step_are_told_once(step: int, left: list[int], tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint starts anew, and tells them anew."""
    for start in (0, step):
        run = run_folder(tmp_path, start)
        run.quarantine(0, [Fault("images", "a.tar", "7", "cut off")])
        if start == 0 and step:
            run.quarantine(3, [Fault("images", "b.tar", "8", "cut off")])
        run.quarantine(9, [Fault("images", "c.tar", "9", "cut off")])
    steps = [json.loads(line)["step"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert steps == [*left, 9]


def test_all_records_and_their_names_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: tmp_path / name for name in ("metrics.jsonl", "eval.jsonl", "quarantine.jsonl", "skipped.jsonl")}
    synced: list[Path] = []
    there: list[bool] = []
    fsync = os.fsync

    def watched(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        there.append(all(path.exists() for path in files.values()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    run = run_folder(tmp_path, 0)
    assert there[synced.index(tmp_path)], "the folder was synced before all files were in it"
    for way in (run.sync, run.close):
        synced.clear()
        way()
        assert {*files.values()} <= {*synced}


def test_what_computes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log's first lines, in every record, and as a text of TensorBoard."""
    with caplog.at_level(logging.INFO):
        run = run_folder(tmp_path, 0)
    run.step({"step": 1, "loss": 2.0, "samples_per_s": 1.0})
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    computes = record["computes"]
    assert computes.startswith(f"CPU, torch {torch.__version__}, DeepSpeed ")
    assert computes.endswith(", bf16, kernels torch, attention padded")
    assert f"computed by {computes}" in caplog.messages[:2]
    run.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert computes.encode() in events.read_bytes()


@pytest.mark.parametrize(
    ("kernels", "apex", "end"),
    [
        ("auto", True, "kernels triton, attention varlen"),
        ("torch", True, "kernels torch, attention padded, layer_norm apex"),
        ("torch", False, "kernels torch, attention padded"),
    ],
)
def test_what_computes_on_a_gpu(kernels: str, apex: bool, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    installed = ("triton", "torch.nn.attention.varlen")
    monkeypatch.setattr("beit3_dist.kernels.registry.find_spec", lambda module: module in installed or None)
    monkeypatch.setattr("beit3_dist.kernels.layer_norm.apex.apex_layer_norm", lambda: print if apex else None)
    data = DataConfig(images="a.tar", texts="b.tar", pairs="c.tar")
    config = RunConfig(out="out", data=data, image_tokenizer="i", text_tokenizer="t", kernels=kernels)
    computes = computed_by(config, torch.device("cuda", 0))
    assert computes.startswith("NVIDIA H200, torch ") and computes.endswith(f", bf16, {end}")
