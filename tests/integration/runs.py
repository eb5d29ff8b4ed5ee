"""Small runs for the integration tests: real tars, a real SentencePiece model, a VQ-KD network of random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beit3_dist.checkpoint.find import find
from beit3_dist.command_line import to_yaml
from beit3_dist.config import (
    STREAMS,
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from beit3_dist.image_tokenizer.files import save_vqkd
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.preflight import prepare_run
from beit3_dist.train.pretraining import pretrain
from tests.unit.tar_fixtures import small_run

CODES = 40
REPOSITORY = Path(__file__).parents[2]


def save_random_tokenizer(path: Path, **changes: int) -> Path:
    """An untrained image tokenizer of 16 codes for pictures of 32 pixels."""
    geometry = {"patch_size": 8, "width": 16, "layers": 1, "heads": 2, "codebook_size": CODES, "code_dim": 8}
    tokenizer = VQKD(32, **(geometry | changes), decoder_layers=1, target_dim=8)
    tokenizer.initialize(0)
    save_vqkd(tokenizer, path)
    return path


def run_config(folder: Path, **changes: Any) -> RunConfig:
    """A run of 12 steps over the shards in `folder`, which are made where they are missing."""
    config = small_run(folder)
    tokenizer = folder / "image_tokenizer.pth"
    if not tokenizer.exists():
        save_random_tokenizer(tokenizer)
    model = ModelConfig(layers=2, width=32, heads=2, ffn_width=64, patch_size=8, image_size=32, vocab_size=310,
                        visual_vocab_size=CODES, vl_expert_layers=1, max_text_length=18, drop_path=0.2)  # fmt: skip
    settings: dict[str, Any] = {
        "out": str(folder / "run"), "steps": 12, "precision": "fp32", "model": model,
        "image_tokenizer": str(tokenizer), "data": replace(config.data, workers=0),
        "batch": BatchConfig(images=4, texts=4, pairs=4, accumulation=2), "parallel": ParallelConfig(zero_stage=3),
        "optim": OptimConfig(lr=1e-3, warmup_steps=3), "checkpoint": CheckpointConfig(every=4),
    }  # fmt: skip
    return replace(config, **(settings | changes))


def write_recipe(config: RunConfig, path: Path) -> Path:
    """The config as a recipe file."""
    path.write_text(to_yaml(config))
    return path


def train(groups: Groups, config: RunConfig) -> str:
    """For `run_workers`: what launchers/pretrain.py does after parsing. Returns the message of an error, or ''."""
    try:
        pretrain(prepare_run(config, groups.mesh))
    except RuntimeError as error:
        return str(error)
    return ""


def train_in_turn(groups: Groups, configs: list[RunConfig]) -> None:
    """For `Workers.run`: one run after the other, each to its end."""
    for config in configs:
        assert train(groups, config) == ""


def second_half(config: RunConfig) -> RunConfig:
    """The same run, resumed in a folder of its own from the checkpoint of its first half."""
    half = f"{config.out}/checkpoints/step_{config.steps // 2:07}"
    return replace(config, out=f"{config.out}-resumed", checkpoint=replace(config.checkpoint, resume=half))


def start(*command: str) -> subprocess.Popen:
    """A Python command in the repository's root, with all its processes in a process group of their own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=environment, start_new_session=True,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def wait_for_steps(process: subprocess.Popen, out: str | Path, steps: int) -> None:
    """Returns when the run in `out` has recorded so many steps; fails with the process's output if it ends before."""
    log, deadline = Path(out, "metrics.jsonl"), time.monotonic() + 240
    while not log.exists() or len(log.read_bytes().splitlines()) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def wait_for_checkpoint(process: subprocess.Popen, out: str | Path) -> None:
    """Returns when the run in `out` has a whole checkpoint, which is written beside its steps and can come late."""
    folder, deadline = Path(out, "checkpoints"), time.monotonic() + 240
    while find("auto", folder) is None:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to all processes of `start`."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def validated(config: RunConfig, every: int) -> EvalConfig:
    """Validations of one batch of what is trained on."""
    return EvalConfig(every=every, batches=1, **{name: getattr(config.data, name) for name in STREAMS})


def metrics(out: str | Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def evaluations(out: str | Path) -> list[dict[str, Any]]:
    """The records of eval.jsonl."""
    return [json.loads(line) for line in (Path(out) / "eval.jsonl").read_text().splitlines()]


def same_losses(
    out: Path, reference: Path, steps: int, weights: Mapping[str, float]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Asserts that the records of a run's steps and of its two validations have the losses of another run's, which add
    up by `weights` (1 where none is named). Gives each record with the other's, for more to be asked of them."""
    for read in (metrics, evaluations):
        assert len(read(out)) == len(read(reference)) == (steps if read is metrics else 2)
        for record, expected in zip(read(out), read(reference), strict=True):
            assert record.get("sample_hash") == expected.get("sample_hash")
            losses = {name: expected[name] for name in named(expected, "loss")}
            assert {name: record[name] for name in named(record, "loss")} == pytest.approx(losses, rel=1e-5)
            parts = (weights.get(name, 1) * value for name, value in losses.items() if name != "loss")
            assert losses["loss"] == pytest.approx(sum(parts), rel=1e-6)
            yield record, expected


def named(record: dict[str, Any], beginning: str) -> set[str]:
    """The fields of a record with this beginning."""
    return {name for name in record if name.startswith(beginning)}


TIMES = ("tokens_per_s", "samples_per_s", "tflops_per_device", "data_wait_s", "step_s", "memory_gb")


def reproducible(out: str | Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock or the process."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in metrics(out)]
