"""Every downstream task trains alike in one process, under ZeRO-3 and on tensor ranks, and goes on after a kill as if
nothing had happened."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint.model_folder import read_model_folder
from beit3_dist.checkpoint.store import TrainState
from beit3_dist.command_line import parse
from beit3_dist.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.inference import Model
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.guards import Guards
from beit3_dist.run.preflight_finetuning import prepare_finetuning
from beit3_dist.tasks.base import Task
from beit3_dist.tasks.config import (
    DenseConfig,
    FinetuneConfig,
    TaskBatchConfig,
    TaskDataConfig,
    TaskEvalConfig,
)
from beit3_dist.tasks.registry import task_class
from beit3_dist.train.finetuning import finetune
from tests.integration.runs import metrics, reproducible
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import pair_tar, picture, sentences, train_tokenizer
from tools import evaluate

EXAMPLES, PICTURES, STEPS, SAVED, KILLED = 22, 10, 6, 3, 5
CLASSES = ["red", "green", "blue", "black", "white"]

MODEL = ModelConfig(layers=2, width=32, heads=2, ffn_width=64, patch_size=8, image_size=32, vocab_size=310,
                    visual_vocab_size=16, vl_expert_layers=1, max_text_length=24, drop_path=0.3)  # fmt: skip

OPTIM = OptimConfig(lr=1e-3, warmup_steps=2, eps=1e-6, clip_norm=1.0)
SMOOTH = replace(OPTIM, eps=1e-2)
"""With which AdamW's first steps follow the gradients, not their signs. A detector chooses by what it computes: the
best proposals, what overlaps enough, the side that an offset errs to. Layouts differ by fp32's rounding, of which AdamW
makes steps of the whole rate where a gradient is nearly nothing, and once a choice falls otherwise losses are 1e-4
apart. In fp64, with the eps of the others, six steps of these losses are within 3e-16 of one process's on two replicas
and on two tensor ranks."""
FOUND = DenseConfig(channels=8, proposals=20, regions=8)

TASKS: dict[str, dict[str, Any]] = {  # task, or case of one -> what its run has beside the common settings
    "imagenet": {"mixup": 0.8, "cutmix": 1.0, "layer_decay": 0.7},
    "imagenet_retrieval": {"batch": TaskBatchConfig(size=8), "ema_decay": 0.5},
    "vqa": {"head_lr_scale": 5.0, "ema_decay": 0.5},
    "open_vqa": {"drop_worst_ratio": 0.0},
    "nlvr2": {},
    "captioning": {"eval": TaskEvalConfig(beams=2), "drop_worst_after": 1, "activation_checkpointing": "full"},
    "retrieval": {"batch": TaskBatchConfig(size=8), "activation_checkpointing": "full"},
    "retrieval_matching": {"batch": TaskBatchConfig(size=8), "eval": TaskEvalConfig(batch=2, rerank=3)},
    "itc": {"batch": TaskBatchConfig(size=8)},
    "text": {"ema_decay": 0.9, "layer_decay": 0.5},
    "text_classification": {"head_lr_scale": 5.0},
    "numbers": {"task": "text_classification", "ema_decay": 0.5},  # STS-B's form
    "detection": {
        "dense": replace(FOUND, window=2, global_blocks=1, cascade=True),
        "layer_decay": 0.7,
        "optim": SMOOTH,
    },
    "instance_segmentation": {
        "dense": FOUND,
        "ema_decay": 0.5,
        "optim": SMOOTH,
        "activation_checkpointing": "full",
        "eval": TaskEvalConfig(batch=2, soft_nms=0.6, maskness=True),
    },
}
OWN_RECIPES = ("open_vqa", "retrieval_matching", "text_classification")
RECIPES = Path(__file__).parents[2] / "launchers" / "recipes" / "finetune"
KILLED_TASKS = ("imagenet_retrieval", "captioning", "numbers")
"""Of those whose processes are killed: with a moving average, with losses of words, and with that of a number. All
others go on from the same checkpoint."""
FUSED: dict[str, Any] = dict(layers=4, attention="per_modality", vl_expert_layers=0, fusion_layers=2, connected_every=1,
                             vision_layers=1, vision_width=48, vision_heads=4, decoder_layers=1)  # fmt: skip
"""Changes of a model to one with all of mPLUG's kinds of layers."""
LAYOUTS = {"one": ParallelConfig(zero_stage=1), "dp2": ParallelConfig(zero_stage=3),
           "tp2": ParallelConfig(zero_stage=1, tensor=2)}  # fmt: skip


def objects(n: int) -> list[dict[str, Any]]:
    """None, one or five in an image of 40 x 30 pixels: of a micro-batch a rank may have none, the other ten."""
    corners = [(k, 2 * k, 10 + n % 7 + 2 * k, 12 + k) for k in range((0, 1, 5)[n % 3])]
    return [{"id": 10 * n + k, "label": (n + k) % 5, "box": [x, y, w, h],
             "mask": [[x, y, x + w, y, x + w, y + h, x, y + h]]} for k, (x, y, w, h) in enumerate(corners)]  # fmt: skip


def records(task: str, tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    """Lines of a task's index."""
    words = [tokenizer.encode(line)[: 4 + n % 9] for n, line in enumerate(sentences()[:EXAMPLES])]
    made = []
    for n in range(EXAMPLES):
        path, other = f"{n % PICTURES}.png", f"{(n + 3) % PICTURES}.png"
        made.append(
            {
                "imagenet": {"image_path": path, "label": n % 5},
                "imagenet_retrieval": {"image_path": path, "label": n % 5},
                "vqa": {"image_path": path, "text_segment": words[n], "labels": [n % 5, (n + 1) % 5],
                        "scores": [1.0, 0.3], "qid": n},
                "open_vqa": {"image_path": path, "text_segment": words[n][:4], "labels": [n % 5, (n + 1) % 5],
                             "scores": [1.0, 0.3], "qid": n},
                "nlvr2": {"image_path": path, "image2_path": other, "text_segment": words[n], "label": n % 2,
                          "identifier": f"id-{n}"},
                "captioning": {"image_path": path, "text_segment": words[n], "image_id": n % PICTURES},
                "retrieval": {"image_path": path, "text_segment": words[n], "image_id": n % PICTURES},
                "retrieval_matching": {"image_path": path, "text_segment": words[n], "image_id": n % PICTURES},
                "itc": {"image_path": path, "text_segment": words[n], "image_id": n % PICTURES},
                "text": {"text_segment": words[n], "label": n % 5},
                "text_classification": {"text_segment": words[n], "text_segment2": words[-n], "label": n % 5},
                "numbers": {"text_segment": words[n], "text_segment2": words[-n], "label": n % 7 / 2},
                "detection": {"image_path": path, "image_id": n, "width": 40, "height": 30, "objects": objects(n)},
                "instance_segmentation": {"image_path": path, "image_id": n, "width": 40, "height": 30,
                                          "objects": objects(n)},
            }[task]
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, indexes, a tokenizer, pair shards."""
    folder = tmp_path_factory.mktemp("finetuning")
    train_tokenizer(folder / "text.spm")
    for n in range(PICTURES):
        (folder / f"{n}.png").write_bytes(picture(n))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "number.txt").write_text("number\n")
    tokenizer = TextTokenizer(str(folder / "text.spm"))
    for task in TASKS:
        lines = [json.dumps(record) for record in records(task, tokenizer)]
        (folder / f"{task}.train.jsonl").write_text("\n".join(lines) + "\n")
        (folder / f"{task}.validation.jsonl").write_text("\n".join(lines[:PICTURES][:7]) + "\n")  # odd: uneven ranks
    pair_tar(folder / "pairs.tar", 9)
    return folder


def kind_of(task: str) -> type[Task]:
    return task_class(TASKS[task].get("task", task))


def run_config(folder: Path, task: str, layout: str, out: str) -> FinetuneConfig:
    train = folder / "pairs.tar" if task == "itc" else folder / f"{task}.train.jsonl"
    names = folder / ("number.txt" if task == "numbers" else "classes.txt")
    settings: dict[str, Any] = {
        "task": task, "out": str(folder / out / task), "text_tokenizer": str(folder / "text.spm"), "steps": STEPS,
        "precision": "fp32", "model": MODEL, "parallel": LAYOUTS[layout], "checkpoint": CheckpointConfig(every=SAVED),
        "data": TaskDataConfig(train=str(train), validation=str(folder / f"{task}.validation.jsonl"),
                               images=str(folder), text_length=12, workers=0, cache=str(folder / "cache"),
                               answers=str(names) if kind_of(task).needs_names else ""),
        "batch": TaskBatchConfig(size=8, accumulation=2), "eval": TaskEvalConfig(batch=2),
        "optim": OPTIM,
    }  # fmt: skip
    return FinetuneConfig(**(settings | TASKS[task]))


def recipe_config(folder: Path, task: str) -> FinetuneConfig:
    """The task's recipe for base with the tiny model, a few steps, and in fp32."""
    own = run_config(folder, task, "one", "recipe")
    asked = {
        "config": RECIPES / f"{task}_base.yaml", "out": own.out, "text_tokenizer": own.text_tokenizer,
        "data.train": own.data.train, "data.validation": own.data.validation, "data.images": own.data.images,
        "data.answers": own.data.answers, "data.text_length": own.data.text_length, "data.workers": 0,
        **{f"model.{field}": getattr(MODEL, field) for field in (
            "layers", "width", "heads", "ffn_width", "patch_size", "image_size", "vocab_size", "visual_vocab_size",
            "max_text_length")},
        "batch.size": 8, "precision": "fp32", "steps": 4, "epochs": 0, "warmup_epochs": 0,
    }  # fmt: skip
    arguments = [part for field, value in asked.items() for part in (f"--{field}", str(value))]
    return parse(FinetuneConfig, "", "", arguments)


def run(groups: Groups, configs: list[FinetuneConfig]) -> None:
    """For `run_workers`: what launchers/finetune.py does after parsing, run after run."""
    for config in configs:
        finetune(prepare_finetuning(config, groups.mesh))


def run_and_die(groups: Groups, config: FinetuneConfig) -> None:
    """All processes are killed after step KILLED, whose record is written."""

    def die(guards: Guards, state: TrainState) -> None:
        if state.step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    Guards.check_samples = die  # type: ignore[method-assign]  # this process has nothing else to do
    run(groups, [config])


def losses(folder: Path, out: str, task: str, field: str) -> torch.Tensor:
    return torch.tensor([record[field] for record in metrics(folder / out / task)], dtype=torch.float64)


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Path:
    """The folder after every task has run in one process, and the recipes that nobody else's figures come from."""
    of_recipes = [recipe_config(folder, task) for task in OWN_RECIPES]
    run_workers(1, run, [*(run_config(folder, task, "one", "one") for task in TASKS), *of_recipes])
    return folder


@pytest.fixture(scope="module")
def two_replicas(folder: Path) -> Path:
    """The same after two."""
    run_workers(2, run, [run_config(folder, task, "dp2", "dp2") for task in TASKS])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", OWN_RECIPES)
def test_recipes_without_a_published_figure_train(one_process: Path, task: str) -> None:
    """By all that the recipe says but for sizes and length; what came of it is validated and written."""
    out = one_process / "recipe" / task
    records = metrics(out)
    assert len(records) == 4 and all(0 < record["grad_norm"] < math.inf for record in records)
    assert json.loads((out / "eval.jsonl").read_text())["step"] == 4 and read_model_folder(out / "model").task


@pytest.mark.slow
def test_the_model_for_use_predicts_what_the_run_predicted(one_process: Path) -> None:
    """OUT/model, asked from Python, against OUT/predictions of the same weights."""
    out = one_process / "one"
    tokenizer = TextTokenizer(str(one_process / "text.spm"))
    models = {task: Model.load(out / task / "model", "cpu") for task in TASKS}
    asked = {task: [json.loads(line) for line in (one_process / f"{task}.validation.jsonl").read_text().splitlines()]
             for task in TASKS}  # fmt: skip
    written = {task: next((out / task / "predictions").iterdir()).read_text() for task in TASKS}

    def pictures(task: str, field: str = "image_path") -> list[Path]:
        return [one_process / line[field] for line in asked[task]]

    def texts(task: str) -> list[str]:
        return [tokenizer.decode(line["text_segment"]) for line in asked[task]]

    captions = {line["image_id"]: line["caption"] for line in json.loads(written["captioning"])}
    by_picture = dict(zip((line["image_id"] for line in asked["captioning"]),
                          models["captioning"].caption(pictures("captioning"), beams=2), strict=True))  # fmt: skip
    assert by_picture == captions
    for task in ("vqa", "open_vqa"):
        answers = [line["answer"] for line in json.loads(written[task])]
        assert models[task].answer(pictures(task), texts(task)) == answers, task
    for task, samples in (("imagenet", pictures("imagenet")), ("text", texts("text"))):
        classes = [CLASSES[int(line.rsplit(",", 1)[1])] for line in written[task].splitlines()[1:]]
        assert models[task].classify(samples) == classes, task
    index = str(one_process / "retrieval_matching.validation.jsonl")
    asked_of = [str(out / "retrieval_matching" / "model"), "retrieval", "--data", index, "--images", str(one_process)]
    evaluate.main([*asked_of, "--rerank", "3", "--device", "cpu", "--json", str(one_process / "scores.json")])
    scores = json.loads((out / "retrieval_matching" / "eval.jsonl").read_text())
    for name, value in json.loads((one_process / "scores.json").read_text())["metrics"].items():
        assert scores[name.replace("_retrieval", "")] == pytest.approx(value), name
    told = [line.split("\t")[1] for line in written["text_classification"].splitlines()[1:]]
    seconds = [tokenizer.decode(line["text_segment2"]) for line in asked["text_classification"]]
    assert models["text_classification"].classify_pairs(texts("text_classification"), seconds) == told
    told = [line.split("\t")[1] for line in written["numbers"].splitlines()[1:]]
    assert models["numbers"].classify_pairs(texts("numbers"), seconds) == pytest.approx([*map(float, told)], rel=1e-4)
    truths = [line.rsplit(",", 1)[1] == "True" for line in written["nlvr2"].splitlines()]
    two = list(zip(pictures("nlvr2"), pictures("nlvr2", "image2_path"), strict=True))
    assert models["nlvr2"].is_true(two, texts("nlvr2")) == truths
    drawn = [[box for box in json.loads(written["detection"]) if box["image_id"] == n] for n in range(7)]
    for boxes, found in zip(drawn, models["detection"].detect(pictures("detection")), strict=True):
        assert boxes and [box["score"] for box in boxes] == pytest.approx(found.scores.tolist(), rel=1e-5)
        assert [box["category_id"] - 1 for box in boxes] == found.labels.tolist()
    shown = {path.name for path in (out / "instance_segmentation" / "pictures").iterdir()}
    assert shown == {"0.png", "1.png", "2.png", "3.png"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_any_layout_is_one_process(one_process: Path, layout: str, request: pytest.FixtureRequest) -> None:
    """Losses and gradient norms within fp32 noise (1e-5, see design: what crosses ranks is summed in another order; the
    norms of contrastive tasks from the second step on within 2e-4); the same samples; the same validation, whose
    examples no two ranks can share evenly."""
    folder = one_process
    if layout == "dp2":
        request.getfixturevalue("two_replicas")
    else:
        run_workers(2, run, [run_config(folder, task, layout, layout) for task in TASKS], tensor=2)
    for task in TASKS:
        for field in ("loss", "grad_norm"):
            ours, reference = losses(folder, layout, task, field), losses(folder, "one", task, field)
            # At the start all embeddings are alike and contrastive gradients hardly defined: AdamW makes steps of their
            # noise (see below), and later norms follow them. Over three seeds they were up to 7e-5 apart.
            wild = field == "grad_norm" and kind_of(task).contrastive
            for steps, rtol in ((slice(0, 1), 1e-5), (slice(1, None), 2e-4 if wild else 1e-5)):
                torch.testing.assert_close(
                    ours[steps], reference[steps], rtol=rtol, atol=0, msg=lambda m, t=task, f=field: f"{t} {f}: {m}"
                )
        assert [r["sample_hash"] for r in metrics(folder / layout / task)] == [
            r["sample_hash"] for r in metrics(folder / "one" / task)
        ]
        scores = [json.loads((folder / out / task / "eval.jsonl").read_text()) for out in (layout, "one")]
        # Correlations of seven numbers that hardly differ yet are their noise over their spread.
        assert scores[0] == pytest.approx(scores[1], rel=1e-3 if task == "numbers" else 1e-5), task
        written = [sorted((folder / out / task / "predictions").iterdir()) for out in (layout, "one")]
        assert [path.name for path in written[0]] == [path.name for path in written[1]] and written[0]
        models = [read_model_folder(folder / out / task / "model") for out in (layout, "one")]
        assert models[0].task == models[1].task
        for name, weight in models[1].weights.items():
            # AdamW turns noise of tiny gradients into steps of up to the rate: six steps of 1e-3.
            torch.testing.assert_close(models[0].weights[name], weight, rtol=1e-4, atol=2e-5, msg=f"{task} {name}")


@pytest.mark.slow
def test_fusion_models_learn_alike_and_go_on_bitwise(folder: Path) -> None:
    """What words have seen of an image is read, and a decoder writes; validated in the middle, too."""
    tasks = ("vqa", "nlvr2", "captioning", "open_vqa")

    def of_layout(layout: str, resume: str = "none") -> list[FinetuneConfig]:
        configs = [run_config(folder, task, layout, f"fused-{layout}") for task in tasks]
        configs = [
            replace(c, model=replace(c.model, **FUSED), steps=4, eval=replace(c.eval, every=2),
                    checkpoint=CheckpointConfig(every=2), label_smoothing=0.0) for c in configs
        ]  # fmt: skip
        if resume == "none":
            return configs
        half = [str(Path(c.out) / "checkpoints" / "step_0000002") for c in configs]
        return [
            replace(c, out=c.out.replace("/fused-", "/resumed-"), checkpoint=replace(c.checkpoint, resume=path))
            for c, path in zip(configs, half, strict=True)
        ]

    run_workers(1, run, of_layout("one"))
    run_workers(2, run, [*of_layout("dp2"), *of_layout("dp2", resume="half")])
    run_workers(2, run, of_layout("tp2"), tensor=2)
    for task in tasks:
        for layout in ("dp2", "tp2"):
            for field in ("loss", "grad_norm"):
                ours, expected = (losses(folder, f"fused-{out}", task, field) for out in (layout, "one"))
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0, msg=lambda m, t=task: f"{t}: {m}")
            scores = [(folder / f"fused-{out}" / task / "eval.jsonl").read_text() for out in (layout, "one")]
            for one, other in zip(*(map(json.loads, text.splitlines()) for text in scores), strict=True):
                assert one == pytest.approx(other, rel=1e-5), task
        outs = [folder / name / task for name in ("resumed-dp2", "fused-dp2")]
        assert reproducible(outs[0]) == reproducible(outs[1])[2:], task
        resumed, whole = (read_model_folder(out / "model").weights for out in outs)
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items()), task
        assert any(name.startswith("decoder.") for name in whole) == (task in ("captioning", "open_vqa"))
    written = json.loads(next((folder / "fused-one" / "captioning" / "predictions").iterdir()).read_text())
    model = Model.load(folder / "fused-one" / "captioning" / "model", "cpu")
    pictures = [folder / f"{line['image_id']}.png" for line in written]
    assert model.caption(pictures, beams=2) == [line["caption"] for line in written]


@pytest.mark.slow
def test_micro_batches_of_a_contrastive_task_are_compared_as_one(folder: Path) -> None:
    """Each example is told from all of its step, whatever the accumulation, with drop path on. Negatives of matching
    come from the micro-batch."""
    tasks = [task for task in TASKS if kind_of(task).contrastive and not kind_of(task).matched]
    sizes = {"whole": 1, "parts": 4}
    configs = {
        (task, out): replace(
            run_config(folder, task, "one", out), batch=TaskBatchConfig(size=8, accumulation=sizes[out]), steps=3
        )
        for task in tasks
        for out in sizes
    }
    run_workers(1, run, [*configs.values()])
    for task in tasks:
        for field in ("loss", "acc", "grad_norm"):
            whole, parts = (losses(folder, out, task, field) for out in sizes)
            torch.testing.assert_close(parts[:1], whole[:1], rtol=1e-5, atol=1e-9, msg=lambda m, t=task: f"{t}: {m}")
            torch.testing.assert_close(parts, whole, rtol=2e-4, atol=1e-9, msg=lambda m, t=task: f"{t}: {m}")


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(two_replicas: Path) -> None:
    """ZeRO-3 on two ranks; a moving average is part of what is resumed."""
    folder, resumed = two_replicas, []
    for task in TASKS:
        config = run_config(folder, task, "dp2", "disturbed")
        if task in KILLED_TASKS:
            with pytest.raises(AssertionError, match="died without an answer"):
                run_workers(2, run_and_die, config)
            assert len(metrics(config.out)) == KILLED
        half = str(folder / "dp2" / task / "checkpoints" / f"step_{SAVED:07d}")
        resume = "auto" if task in KILLED_TASKS else half
        resumed.append(replace(config, checkpoint=replace(config.checkpoint, resume=resume)))
    run_workers(2, run, resumed)
    for task in TASKS:
        outs = [folder / out / task for out in ("disturbed", "dp2")]
        before = 0 if task in KILLED_TASKS else SAVED
        assert reproducible(outs[0]) == reproducible(outs[1])[before:], task
        models = [read_model_folder(out / "model").weights for out in outs]
        assert models[0].keys() == models[1].keys()
        assert all(torch.equal(models[0][name], weight) for name, weight in models[1].items()), task
