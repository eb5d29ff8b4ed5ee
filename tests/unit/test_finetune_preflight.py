"""What is wrong with a fine-tuning run is one line before anything starts; recipes say what the released ones say."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.command_line import parse, to_yaml
from beit3_dist.config import ModelConfig, ParallelConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.model import BEiT3
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.preflight_finetuning import check_mixing, names_of, prepare_finetuning, resolve_epochs
from beit3_dist.run.sources import finetuning_sources, same_sources
from beit3_dist.tasks.config import FinetuneConfig, TaskBatchConfig, TaskDataConfig, TaskEvalConfig
from beit3_dist.tasks.registry import task_class
from beit3_dist.train.optimizer import layered_groups
from tests.unit.tar_fixtures import picture, train_tokenizer, write_tar

MESH = Mesh(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))
FILES = sorted((Path(__file__).parents[2] / "launchers/recipes/finetune").glob("*.yaml"))
RECIPES = [path for path in FILES if not path.stem.endswith("_stages")]
RELEASED = [path for path in RECIPES if not path.stem.startswith("demo")]
RECOMPUTED = (
    "captioning_base", "captioning_large", "retrieval_base", "retrieval_large", "retrieval_matching_base", "vqa_large",
    "nlvr2_large", "imagenet_large", "detection_base", "detection_large", "instance_segmentation_base",
    "instance_segmentation_large", "segmentation_large", "segmentation_adapter_large",
)  # fmt: skip
"""Whose released commands have --checkpoint_activations, and those of large images."""
MODEL = ModelConfig(layers=2, width=32, heads=2, ffn_width=48, patch_size=8, image_size=32, vocab_size=310,
                    visual_vocab_size=8, vl_expert_layers=1, max_text_length=16)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    train_tokenizer(folder / "text.spm")
    (folder / "0.png").write_bytes(picture(0))
    words = TextTokenizer(str(folder / "text.spm")).encode("what is this")
    line = {"image_path": "0.png", "text_segment": words, "labels": [1], "scores": [1.0]}
    (folder / "vqa.jsonl").write_text("".join(json.dumps(line | {"qid": number}) + "\n" for number in range(8)))
    (folder / "answers.txt").write_text("no\nyes\n")
    return folder


def run(folder: Path, **changes: Any) -> FinetuneConfig:
    data = TaskDataConfig(train=str(folder / "vqa.jsonl"), images=str(folder), answers=str(folder / "answers.txt"),
                          text_length=10, workers=0)  # fmt: skip
    settings: dict[str, Any] = {
        "task": "vqa", "out": str(folder / "run"), "text_tokenizer": str(folder / "text.spm"), "steps": 3,
        "precision": "fp32", "model": MODEL, "data": data, "batch": TaskBatchConfig(size=4),
    }  # fmt: skip
    return FinetuneConfig(**(settings | changes))


def test_a_run_is_ready(folder: Path) -> None:
    ready = prepare_finetuning(run(folder, epochs=2.5, warmup_epochs=0.5), MESH)
    config = ready.config
    assert (config.steps, config.optim.warmup_steps) == (5, 1)  # 2 steps an epoch
    assert ready.task.classes == ["no", "yes"] and len(ready.train) == 8 and not ready.validation
    assert ready.values("task_head.head.3.weight", torch.Size([2, 64])).shape == (2, 64)


def test_mixing_takes_two_pictures_at_a_time(folder: Path) -> None:
    config = run(folder, task="imagenet", cutmix=1.0, batch=TaskBatchConfig(size=6, accumulation=2))
    with pytest.raises(ValueError, match="batch.size=6 makes micro-batches of 3, but mixup and cutmix take two"):
        prepare_finetuning(config, MESH)
    check_mixing(replace(config, cutmix=0.0), MESH)
    only = replace(config, evaluate_only=True, data=replace(config.data, validation=config.data.train))
    check_mixing(only, MESH)


def test_what_changes_pictures_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run(folder)
    with pytest.raises(ValueError, match="rand_augment='nonsense' is neither beit3 nor a policy"):
        prepare_finetuning(replace(config, data=replace(config.data, rand_augment="nonsense")), MESH)
    index = folder / "pictures.jsonl"
    index.write_text('{"image_path": "0.png", "label": 1}\n' * 4)
    mixed = run(folder, task="imagenet", cutmix=1.0, data=replace(config.data, train=str(index)))
    ready = prepare_finetuning(mixed, MESH)
    assert ready.mixing is not None and ready.mixing.classes == 2 and ready.views.evaluation == "centre"
    monkeypatch.setitem(sys.modules, "timm.data.mixup", None)
    with pytest.raises(ValueError, match="mixing needs timm, which cannot be imported"):
        prepare_finetuning(mixed, MESH)


def test_the_run_folder_can_be_written_to(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^out: .*text.spm/run cannot be written to .* choose another folder"):
        prepare_finetuning(run(folder, out=str(folder / "text.spm" / "run")), MESH)
    prepare_finetuning(run(folder, out=str(folder / "a" / "new")), MESH)
    assert not (folder / "a").exists() and not list(folder.glob(".out*")), "a check leaves nothing behind"


def test_a_resume_notices_another_index(folder: Path) -> None:
    """Examples are put in an order that depends on the seed and their number."""
    config = run(folder)
    ready = prepare_finetuning(config, MESH)
    assert (
        same_sources(config, Path("step_1"), ready.state.sources, finetuning_sources(config, 8, ready.task.tokenizer))
        == ready.state.sources
    )
    index = folder / "longer.jsonl"
    index.write_text((folder / "vqa.jsonl").read_text() * 2)
    longer = replace(config, data=replace(config.data, train=str(index)))
    with pytest.raises(
        ValueError, match="data.train: step_1 was trained with examples=8, .* this run has examples=16,"
    ):
        same_sources(longer, Path("step_1"), ready.state.sources, finetuning_sources(longer, 16, ready.task.tokenizer))
    answers = folder / "renamed.txt"
    answers.write_text("".join(reversed(Path(config.data.answers).read_text().splitlines(keepends=True))))
    renamed = replace(config, data=replace(config.data, answers=str(answers)))
    found = finetuning_sources(renamed, 8, ready.task.tokenizer)
    with pytest.raises(ValueError, match="^data.answers: .* so that labels would mean something else"):
        same_sources(renamed, Path("step_1"), ready.state.sources, found)


def test_pictures_of_classes_come_with_the_names_of_these(folder: Path) -> None:
    index = folder / "imagenet.jsonl"
    index.write_text("".join(f'{{"image_path": "0.png", "label": {label}}}\n' for label in (1, 0)))
    (folder / "names.txt").write_text("a cat\nred circle\n")
    data = TaskDataConfig(train=str(index), validation=str(index), images=str(folder), workers=0, text_length=10,
                          answers=str(folder / "names.txt"))  # fmt: skip
    config = run(folder, task="imagenet_retrieval", data=data)
    ready = prepare_finetuning(config, MESH)
    tokenizer = TextTokenizer(str(folder / "text.spm"))
    expected = [(1, tuple(tokenizer.encode("red circle"))), (0, tuple(tokenizer.encode("a cat")))]
    assert [(example.label, example.words) for example in ready.train] == expected
    (folder / "names.txt").write_text("a cat\na  cat\n")
    with pytest.raises(ValueError, match="classes 0 and 1 are both called 'a  cat'"):
        prepare_finetuning(config, MESH)
    (folder / "names.txt").write_text('["a cat", ""]')
    with pytest.raises(ValueError, match="class 1 has no name"):
        prepare_finetuning(config, MESH)


def test_several_indexes_are_one_after_the_other(folder: Path) -> None:
    """As unilm trains VQA on train and trainable_val."""
    lines = (folder / "vqa.jsonl").read_text().splitlines()
    parts = [folder / "train.jsonl", folder / "trainable_val.jsonl"]
    for part, some in zip(parts, (lines[:3], lines[3:5]), strict=True):
        part.write_text("\n".join(some) + "\n")
    written = folder / "recipe.yaml"
    config = run(folder)
    config = replace(config, data=replace(config.data, train=list(map(str, parts)), validation=[str(parts[1])]))
    written.write_text(to_yaml(config))
    ready = prepare_finetuning(parse(FinetuneConfig, "", "", ["--config", str(written)]), MESH)
    config = ready.config
    assert [len(ready.train), len(ready.validation)] == [5, 2]
    assert [ready.train[place].id for place in range(5)] == list(range(5))
    asked = ["--config", str(written), "--data.train", f"[{parts[1]}, {parts[0]}]"]
    assert parse(FinetuneConfig, "", "", asked).data.train == [str(parts[1]), str(parts[0])]


def test_caption_metrics_need_their_package_only_where_captions_are_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    index = folder / "captions.jsonl"
    index.write_text('{"image_path": "0.png", "text_segment": [5, 6], "image_id": 0}\n')
    data = TaskDataConfig(train=str(index), images=str(folder), text_length=10, workers=0)
    config = run(folder, task="captioning", data=data, eval=TaskEvalConfig(caption_metrics=["bleu4", "cider"]))
    prepare_finetuning(config, MESH)
    with pytest.raises(ValueError, match="pip install --no-deps pycocoevalcap") as error:
        prepare_finetuning(replace(config, data=replace(data, validation=str(index))), MESH)
    assert "\n" not in str(error.value)


def test_epochs_become_steps(folder: Path) -> None:
    config = run(folder)
    assert resolve_epochs(config, 1000) is config
    resolved = resolve_epochs(replace(config, epochs=3, warmup_epochs=1), 1001)
    assert (resolved.steps, resolved.optim.warmup_steps) == (751, 250)


def test_answers_of_unilm_come_in_the_order_of_their_labels(folder: Path) -> None:
    file = folder / "answer2label.txt"
    file.write_text('{"answer": "yes", "label": 1}\n{"answer": "no", "label": 0}\n')
    config = run(folder)
    assert names_of(replace(config, data=replace(config.data, answers=str(file)))) == ["no", "yes"]


def test_classes_from_tars(folder: Path) -> None:
    samples = [{"__key__": f"{n}", "png": picture(n), "cls": str(n % 2).encode()} for n in range(4)]
    tar = write_tar(folder / "classes.tar", samples)
    config = run(folder, task="imagenet")
    ready = prepare_finetuning(replace(config, data=replace(config.data, train=str(tar))), MESH)
    assert [example.label for example in ready.train] == [0, 1, 0, 1]


def test_an_evaluation_alone_needs_a_fine_tuned_model_and_no_training_examples(folder: Path, tmp_path: Path) -> None:
    data = replace(run(folder).data, train="", validation=str(folder / "vqa.jsonl"))
    config = run(folder, evaluate_only=True, data=data)
    with pytest.raises(ValueError, match="evaluate_only: there is no model to evaluate"):
        prepare_finetuning(config, MESH)
    save_model_folder(tmp_path / "pretrained", BEiT3(MODEL).state_dict(), MODEL)
    with pytest.raises(ValueError, match="pretrained has no head of task=vqa"):
        prepare_finetuning(replace(config, init_from=str(tmp_path / "pretrained")), MESH)
    weights = task_class("vqa").network(MODEL, 2).state_dict()
    save_model_folder(tmp_path / "tuned", weights, MODEL)
    ready = prepare_finetuning(replace(config, init_from=str(tmp_path / "tuned")), MESH)
    assert not ready.train and len(ready.validation) == 8
    name = "task_head.head.3.weight"
    assert torch.equal(ready.values(name, weights[name].shape), weights[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.answers": "missing.txt"}, "data.answers='missing.txt': task=vqa needs a file"),
        ({"data.train": "missing.jsonl"}, "missing.jsonl: cannot be read as an index"),
        ({"data.train": []}, "data.train names no index"),
        ({"evaluate_only": True}, "evaluate_only: data.validation names no index"),
        ({"data.train": ["a.tar", "b.tar"], "task": "itc", "data.answers": ""}, "tars are named by one pattern"),
        ({"batch": TaskBatchConfig(size=5, accumulation=2)}, "batch.size=5 is not divisible"),
        ({"model": replace(MODEL, vocab_size=400)}, "needs model.vocab_size=310"),
        ({"init_from": "missing.pth"}, "init_from: there is no file missing.pth"),
        ({"parallel": ParallelConfig(tensor=4)}, "model.heads=2 is not divisible by parallel.tensor=4"),
    ],
)
def test_mistakes_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    config = run(folder)
    data = {name.removeprefix("data."): value for name, value in changes.items() if name.startswith("data.")}
    others = {name: value for name, value in changes.items() if not name.startswith("data.")}
    with pytest.raises((ValueError, OSError)) as error:
        config = replace(config, data=replace(config.data, **data), **others)
        tensor = config.parallel.tensor
        prepare_finetuning(config, replace(MESH, tensor=tensor, world=tensor))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": "nlvr2"},
            "data.answers belongs to detection, imagenet, imagenet_retrieval, instance_segmentation, open_vqa",
        ),
        ({"parallel": ParallelConfig(pipeline=2)}, "set parallel.pipeline=1"),
        ({"warmup_epochs": 2.0, "epochs": 1.0}, "warmup_epochs=2.0 exceeds epochs=1.0"),
        ({"layer_decay": 0.0}, "layer_decay must be positive, not 0.0"),
        (
            {"mixup": 0.8},
            "mixup=0.8 and cutmix=0.0 belong to imagenet, not to task=vqa: leave them at 0",
        ),
        (
            {"task": "retrieval", "head_lr_scale": 2.0},
            "head_lr_scale=2.0: task=retrieval has no head of its own classes",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    config = run(folder)
    data = config.data if changes.get("task") == "nlvr2" else replace(config.data, answers="")
    with pytest.raises(ValueError, match=message):
        run(folder, data=data, **changes)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_whole(recipe: Path) -> None:
    """With what their first lines ask for, they are configs."""
    asked = ["--out", "o", "--text_tokenizer", "t", "--data.train", "x"]
    task = ["--task", "vqa"] if recipe.stem == "demo" else []
    config = parse(FinetuneConfig, "finetune.py", "", ["--config", str(recipe), *asked, *task])
    if recipe.stem.startswith("demo"):
        assert config.task == (recipe.stem.removeprefix("demo").strip("_") or "vqa")
    else:
        assert config.task == re.sub("_in21k|_objects365|_adapter", "", recipe.stem).rpartition("_")[0]
        assert config.model.width == {"base": 768, "large": 1024, "giant": 1408}[recipe.stem.rpartition("_")[2]]
        published = (16_000, 80_000, 160_000, 184_375)
        assert (config.epochs > 0 or config.steps in published) and "Needs --out" in recipe.read_text()


@pytest.mark.parametrize("recipe", RELEASED, ids=lambda path: path.stem)
def test_recipes_change_and_recompute_what_the_released_commands_do(recipe: Path) -> None:
    config = parse(
        FinetuneConfig, "", "", ["--config", str(recipe), "--out", "x", "--text_tokenizer", "", "--data.train", "x"]
    )
    recomputed = recipe.stem in RECOMPUTED or recipe.stem.endswith("_giant")
    assert config.activation_checkpointing == ("full" if recomputed else "none")
    assert config.data.horizontal_flip == 0.5
    imagenets = "rand-m9-mstd0.5-inc1"
    changes = {
        "vqa": "beit3",
        "captioning": "beit3",
        "open_vqa": "beit3",
        "imagenet": imagenets,
        "imagenet_retrieval": imagenets,
    }
    assert config.data.rand_augment == changes.get(config.task, "")
    if config.task == "captioning":
        assert config.eval.caption_metrics == ["bleu4", "cider"]


def test_the_giants_figures_are_the_papers() -> None:
    """Its tables 12 to 14, 16 and 17: rate, batch, epochs and warm-up, layer decay, weight decay, drop path, pixels."""
    table = {
        "imagenet_retrieval_in21k": (5e-5, 16384, 50, 5, 0.85, 0.05, 0.4, 224),
        "imagenet_retrieval": (3e-5, 2048, 15, 3, 0.95, 0.05, 0.4, 336),
        "itc": (3e-5, 16384, 5, 1, 0.95, 0.05, 0.3, 224),
        "retrieval": (1e-5, 3072, 15, 3, 0.95, 0.05, 0.3, 420),
        "vqa": (1e-5, 128, 10, 1, 1.0, 0.01, 0.4, 756),
        "nlvr2": (1e-3, 256, 20, 5, 0.8, 0.05, 0.4, 224),
        "captioning": (8e-6, 256, 0, 0, 1.0, 0.01, 0.3, 392),
        # 250 steps of warm-up: table 16
        "detection_objects365": (1e-4, 64, 15, 0.0092, 0.9, 0.1, 0.6, 1024),
        "instance_segmentation": (5e-5, 64, 20, 0.136, 0.9, 0.1, 0.6, 1280),
    }
    for name, figures in table.items():
        recipe = next(path for path in RECIPES if path.stem == f"{name}_giant")
        asked = ["--config", str(recipe), "--out", "x", "--text_tokenizer", "", "--data.train", "x"]
        config = parse(FinetuneConfig, "", "", asked)
        optim, model = config.optim, config.model
        assert figures == (
            optim.lr, config.batch.size, config.epochs, config.warmup_epochs, config.layer_decay, optim.weight_decay,
            model.drop_path, model.image_size,
        ), name  # fmt: skip
        assert (optim.beta1, optim.beta2, optim.eps) == (
            (0.9, 0.98, 1e-6) if name.endswith("in21k") else (0.9, 0.999, 1e-8)
        )
        assert config.name_smoothing == (0.1 if config.task == "imagenet_retrieval" else 0.0)


def test_layers_learn_at_their_own_rates() -> None:
    """Embeddings slowest, heads at the full rate (times their own factor, which is not the pooler's); every parameter
    in one group; matrices decay, and of the positions those of words, as in the released code."""
    model = task_class("vqa").network(MODEL, 2, device="meta")
    groups = layered_groups(model, 0.05, layers=2, decay=0.5, head=10.0)
    scale = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert len(scale) == len(parameters) == sum(len(group["params"]) for group in groups)
    expected = {
        "vision_embedding.cls_token": (0.125, 0.0),
        "language_embedding.words.weight": (0.125, 0.05),
        "blocks.0.attention.q.shared.weight": (0.25, 0.05),
        "blocks.1.ffn.vl.fc1.bias": (0.5, 0.0),
        "language_embedding.positions": (0.125, 0.05),
        "vision_embedding.positions": (0.125, 0.0),
        "task_head.pooler.norm.weight": (1.0, 0.0),
        "task_head.pooler.dense.weight": (1.0, 0.05),
        "task_head.head.0.weight": (10.0, 0.05),
        "task_head.head.3.bias": (10.0, 0.0),
    }
    assert {name: scale[id(parameters[name])] for name in expected} == expected


def test_a_fusion_model_without_a_decoder_writes_nothing(folder: Path) -> None:
    model = replace(MODEL, attention="per_modality", vl_expert_layers=0, fusion_layers=1)
    for task in ("vqa", "nlvr2", "imagenet", "retrieval", "text"):
        run(folder, task=task, model=model, data=TaskDataConfig(train="t.jsonl", text_length=10))
    caption = {"task": "captioning", "data": TaskDataConfig(train="t.jsonl", text_length=10)}
    with pytest.raises(
        ValueError, match=r"model\.fusion_layers=1 without model\.decoder_layers: task=captioning needs"
    ):
        run(folder, model=model, **caption)
    run(folder, model=replace(model, decoder_layers=1), **caption)
