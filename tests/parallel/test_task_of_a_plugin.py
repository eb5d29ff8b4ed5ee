"""A task from outside the package is one file: it is fine-tuned in any layout, evaluated and used like the others."""

from __future__ import annotations

import csv
import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from beit3_dist.checkpoint.model_folder import read_model_folder
from beit3_dist.config import CheckpointConfig, OptimConfig
from beit3_dist.data.loader import loader
from beit3_dist.inference import Model
from beit3_dist.parallel.mesh import Groups
from beit3_dist.tasks.config import FinetuneConfig, TaskBatchConfig, TaskDataConfig, TaskEvalConfig
from beit3_dist.tasks.data.augmentation import Views
from beit3_dist.tasks.data.batches import Examples, Places
from beit3_dist.tasks.registry import register
from tests.integration.runs import metrics
from tests.parallel import test_finetuning
from tests.parallel.test_finetuning import LAYOUTS, MODEL
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import train_tokenizer

PLUGIN = "tests.plugins.mostly_red"
IMAGES, STEPS = 24, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one colour, every second one red, with their indexes."""
    folder = tmp_path_factory.mktemp("plugin")
    train_tokenizer(folder / "text.spm")
    lines = []
    for n in range(IMAGES):
        level, red = 150 + 4 * n, n % 2 == 0
        Image.new("RGB", (40, 30), (level, 20, 30) if red else (20, level, 255 - level)).save(folder / f"{n}.png")
        lines.append(json.dumps({"file": f"{n}.png", "red": red}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "validation.jsonl").write_text("".join(lines[:7]))
    return folder


def run_config(folder: Path, layout: str) -> FinetuneConfig:
    import_module(PLUGIN)
    data = TaskDataConfig(train=str(folder / "train.jsonl"), validation=str(folder / "validation.jsonl"),
                          images=str(folder), text_length=12, workers=0)  # fmt: skip
    return FinetuneConfig(
        task="mostly_red", out=str(folder / layout), text_tokenizer=str(folder / "text.spm"), steps=STEPS,
        precision="fp32", model=MODEL, parallel=LAYOUTS[layout], checkpoint=CheckpointConfig(every=STEPS), data=data,
        batch=TaskBatchConfig(size=8), optim=OptimConfig(lr=3e-3, warmup_steps=2, clip_norm=1.0), head_lr_scale=10,
        eval=TaskEvalConfig(batch=2),
    )  # fmt: skip


def run(groups: Groups, config: FinetuneConfig) -> None:
    """For `run_workers`: the plugin is imported before the recipe is looked at."""
    import_module(PLUGIN)
    test_finetuning.run(groups, [config])


@pytest.mark.slow
def test_a_task_of_a_plugin(folder: Path) -> None:
    run_workers(1, run, run_config(folder, "one"))
    run_workers(2, run, run_config(folder, "dp2"))
    records: dict[str, list[dict[str, Any]]] = {out: metrics(folder / out) for out in ("one", "dp2")}
    for field in ("loss", "grad_norm"):  # as in test_finetuning
        ours, reference = (torch.tensor([record[field] for record in records[out]]) for out in ("dp2", "one"))
        torch.testing.assert_close(ours[:6], reference[:6], rtol=1e-5, atol=0)
    assert [r["sample_hash"] for r in records["one"]] == [r["sample_hash"] for r in records["dp2"]]

    for out in ("one", "dp2"):
        (evaluated,) = map(json.loads, (folder / out / "eval.jsonl").read_text().splitlines())
        assert evaluated == {"step": STEPS, "accuracy": 1.0}
        with open(folder / out / "predictions" / "mostly_red.csv") as file:
            assert list(csv.reader(file)) == [[f"{n}.png", str(n % 2 == 0)] for n in range(7)]
        model = Model.load(folder / out / "model", "cpu")
        assert model.predict([folder / f"{n}.png" for n in range(IMAGES)]) == [n % 2 == 0 for n in range(IMAGES)]
        with pytest.raises(ValueError, match="was fine-tuned for mostly_red; classes need a model of task imagenet"):
            model.classify([folder / "0.png"])
    assert read_model_folder(folder / "one" / "model").task == {
        "name": "mostly_red", "classes": 0, "answers": [], "text_length": 12,
    }  # fmt: skip


def test_a_faulty_line_of_its_index_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text('{"file": "0.png", "red": true}\n{"file": "1.png", "red": 1}\n')
    config = run_config(folder, "one")
    config.data.train = str(tmp_path / "index.jsonl")
    task = import_module(PLUGIN).MostlyRed(config, None)
    with pytest.raises(ValueError, match="1 faults in the 2 lines of the mostly_red index: .*line 2: the field 'red'"):
        task.examples(train=True)


def test_a_name_is_that_of_one_task() -> None:
    task = import_module(PLUGIN).MostlyRed
    with pytest.raises(ValueError, match="the task 'vqa' of tests.plugins.mostly_red has the name of that of beit3"):
        register("vqa")(task)


def test_loader_processes_find_it(folder: Path) -> None:
    """They are no forks of this process, which has imported it."""
    task = import_module(PLUGIN).MostlyRed(run_config(folder, "one"), None)
    examples = Examples(task.examples(train=True), train=False, views=Views(), image_size=32, max_words=12, seed=0,
                        labels=partial(task.labels, classes=0))  # fmt: skip
    (batch,) = loader(examples, iter([Places((1, 2), (True, True))]), 1, 1, False)
    assert batch.labels.tolist() == [0, 1] and batch.images.shape == (2, 1, 3, 32, 32)
