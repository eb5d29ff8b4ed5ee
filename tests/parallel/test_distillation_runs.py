"""Distillation beside masking: one process's losses and gradients in any layout; resumed bitwise; teachers watched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint.read import read_weights
from beit3_dist.config import BatchConfig, CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.objectives.distillation import NAME
from beit3_dist.objectives.masked_data_modeling import NAME as MASKING
from beit3_dist.objectives.masked_data_modeling import MaskedDataModelingConfig
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.preflight import prepare_run
from tests.equality import assert_tensors_close
from tests.integration.runs import named, reproducible, run_config, same_losses, second_half, train_in_turn, validated
from tests.parallel.test_contrastive_runs import LAST, STEPS, first_gradients
from tests.parallel.workers import Workers
from tests.unit.test_distillation import WIDTH, beit3, distilled

RUNS: dict[str, dict[str, int]] = {
    "one": {"zero_stage": 1},
    "dp2": {"zero_stage": 3},
    "tp2": {"zero_stage": 1, "tensor": 2},
    "pp2": {"zero_stage": 1, "pipeline": 2},
}
LOSSES = {f"loss_distilled_{side}" for side in ("image", "text", "pair_image", "pair_text")}


def with_teachers(folder: Path, name: str) -> RunConfig:
    """Features in place of codes where patches of images are hidden, without an image tokenizer; distributions of
    hidden words beside the words; all features of whole pairs."""
    config = run_config(folder)
    lessons = {
        "images": beit3(folder, config, learns="masked_features", channels=WIDTH, weight=0.5),
        "texts": beit3(folder, config, learns="masked_logits", temperature=2.0, weight=0.5),
        "pairs": beit3(folder, config, learns="features", channels=WIDTH, compared="smooth_l1", weight=0.5),
    }
    settings: dict[str, Any] = {
        "out": str(folder / name), "image_tokenizer": "", "steps": STEPS, "parallel": ParallelConfig(**RUNS[name]),
        "batch": BatchConfig(images=4, texts=4, pairs=4, accumulation=2),
        "checkpoint": CheckpointConfig(every=1, keep=0), "eval": validated(config, every=2),
    }  # fmt: skip
    return distilled(replace(config, **settings), lessons, **{MASKING: MaskedDataModelingConfig(predict_codes=False)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs; that of two replicas is resumed in its middle, too."""
    folder = tmp_path_factory.mktemp("distillation")
    for name, parallel in RUNS.items():
        config = with_teachers(folder, name)
        layout = 1 if name == "one" else 2, parallel.get("tensor", 1), parallel.get("pipeline", 1)
        with Workers(*layout) as workers:
            workers.run(train_in_turn, [config, second_half(config)] if name == "dp2" else [config])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp2", "tp2", "pp2"])
def test_losses_and_gradients_are_those_of_one_process(folder: Path, name: str) -> None:
    assert_tensors_close(first_gradients(folder / name), first_gradients(folder / "one"))
    for record, _ in same_losses(folder / name, folder / "one", STEPS, dict.fromkeys(LOSSES, 0.5)):
        assert named(record, "loss") == LOSSES | {"loss", "loss_text", "loss_pair_text"}
        assert {field for field in record if field.startswith("acc_distilled")} == {"acc_distilled_text"}


@pytest.mark.slow
def test_resumed_bit_for_bit_without_the_teachers_weights(folder: Path) -> None:
    assert reproducible(folder / "dp2-resumed") == reproducible(folder / "dp2")[STEPS // 2 :]
    undisturbed, found = read_weights(folder / "dp2" / LAST), read_weights(folder / "dp2-resumed" / LAST)
    head = f"objective_heads.{NAME}"
    sides = ("image", "pair_image", "pair_text")
    assert {name for name in found if "distil" in name or "teacher" in name} == {
        f"{head}.distilled_{side}.{part}" for side in sides for part in ("weight", "bias")
    }
    assert all(torch.equal(value, found[name]) for name, value in undisturbed.items())


@pytest.mark.slow
def test_another_teacher_is_noticed_and_another_place_is_not(folder: Path, tmp_path: Path) -> None:
    config = second_half(with_teachers(folder, "one"))
    there = config.objectives[NAME].texts.teacher.weights
    shutil.copytree(there, tmp_path / "moved")
    teacher = replace(config.objectives[NAME].texts.teacher, weights=str(tmp_path / "moved"))
    section = replace(config.objectives[NAME], texts=replace(config.objectives[NAME].texts, teacher=teacher))
    moved = replace(config, out=str(tmp_path / "run"), objectives=config.objectives | {NAME: section})
    alone = Mesh(0, 1, 0, 1, torch.device("cpu"))
    prepare_run(moved, alone)
    weights = tmp_path / "moved" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1
    weights.write_bytes(content)
    field = "objectives.distillation.texts.teacher.weights"
    with pytest.raises(ValueError, match=f"{field}: .* so that another network would teach from here on"):
        prepare_run(moved, alone)
