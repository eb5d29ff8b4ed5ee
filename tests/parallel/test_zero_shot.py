"""Validations that score the model as it is: the same in every layout, and what tools/evaluate.py says."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from beit3_dist.checkpoint.formats import read_source
from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.config import BatchConfig, ParallelConfig, RunConfig
from beit3_dist.data.text import TextTokenizer
from beit3_dist.inference import Model
from beit3_dist.objectives.contrastive import ContrastiveConfig
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModelingConfig
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.preflight import prepare_run
from beit3_dist.tasks.data.zero_shot import TEMPLATES, read_templates, spread
from tests.integration.runs import evaluations, metrics, run_config, train_in_turn, validated
from tests.parallel.workers import Workers
from tests.unit.tar_fixtures import picture, write_tar
from tools import evaluate

NAMES = ["red square", "green circle", "blue tree", "black dog", "white cat", "grey house"]
SCORED = "checkpoints", "step_0000002"
ALONE = Mesh(0, 1, 0, 1, torch.device("cpu"))


def config_of(folder: Path, out: str, **parallel: Any) -> RunConfig:
    """A short run of contrast with fast steps, so that vectors are no longer those of the beginning."""
    config = run_config(folder, steps=3, optim=replace(run_config(folder).optim, lr=0.01, warmup_steps=1))
    images = [{"__key__": str(n), "png": picture(n), "cls": str(n % 6).encode()} for n in range(15)]
    pairs = [{"__key__": str(n), "png": picture(n), "txt": f"a word {n}\n{n} more".encode()} for n in range(11)]
    if not (folder / "names.txt").exists():
        write_tar(folder / "classes.tar", images)
        write_tar(
            folder / "train.tar",
            [image | {"__key__": str(n), "png": picture(n + 20)} for n, image in enumerate(images * 2)],
        )
        write_tar(folder / "pairs.tar", pairs)
        (folder / "names.txt").write_text("\n".join(NAMES))
    zero_shot = {"retrieval": folder / "pairs.tar", "classes": folder / "classes.tar",
                 "classes_train": folder / "train.tar", "class_names": folder / "names.txt"}  # fmt: skip
    held_out = replace(validated(config, every=2), **{name: str(path) for name, path in zero_shot.items()}, at_most=12)
    batch = BatchConfig(images=0, texts=0, pairs=8)
    objectives: dict[str, Any] = {"contrastive": ContrastiveConfig(dim=24),
                                  "prefix_language_modeling": PrefixLanguageModelingConfig()}  # fmt: skip
    layout = ParallelConfig(**parallel)
    settings = {"out": str(folder / out), "init_from": str(folder / "start"), "objectives": objectives,
                "checkpoint": replace(config.checkpoint, every=2)}  # fmt: skip
    return replace(config, **settings, batch=batch, eval=held_out, parallel=layout)


def with_captions(config: RunConfig) -> RunConfig:
    return replace(config, eval=replace(config.eval, captions=str(Path(config.out).parent / "captions.tar")))


def talkative(run: Path, folder: Path) -> None:
    """The model of a run as one that says more than nothing of an image."""
    content = read_source(run)
    content.weights["text_head.bias"][TextTokenizer.eos] -= 8
    save_model_folder(folder, content.weights, content.config)


def scores(out: str | Path) -> dict[str, float]:
    """What the last validation of a run has found beside its losses and accuracies."""
    record = evaluations(out)[-1]
    return {
        name: value
        for name, value in record.items()
        if name not in ("step", "loss") and "contrastive" not in name and "next_word" not in name
    }


@pytest.mark.slow
def test_every_layout_scores_as_the_tool_does(tmp_path: Path) -> None:
    one = config_of(tmp_path, "one", zero_stage=1)
    unscored = replace(one, out=str(tmp_path / "unscored"), eval=replace(one.eval, every=0))
    with Workers(1) as workers:
        workers.run(train_in_turn, [replace(unscored, init_from="", steps=1)])
        talkative(Path(unscored.out), Path(one.init_from))
        workers.run(train_in_turn, [unscored := replace(unscored, out=str(tmp_path / "again"))])
        says = Model.of(read_source(Path(unscored.out, *SCORED)), "unscored", "cpu", "captioning")
        texts = says.caption([Image.open(io.BytesIO(picture(n))) for n in range(11)])
        pairs = [{"__key__": str(n), "png": picture(n), "txt": (t if n % 2 else "never").encode()}
                 for n, t in enumerate(texts)]  # fmt: skip
        write_tar(tmp_path / "captions.tar", pairs)
        workers.run(train_in_turn, [one := with_captions(one)])
    with Workers(2) as workers:
        workers.run(train_in_turn, [with_captions(config_of(tmp_path, "dp2", zero_stage=3))])
    with Workers(2, tensor=2) as workers:
        sequence = config_of(tmp_path, "sp2", zero_stage=3, tensor=2, sequence=True)
        workers.run(train_in_turn, [with_captions(config_of(tmp_path, "tp2", zero_stage=1, tensor=2)), sequence])
    found = scores(one.out)
    recalls = [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)]
    accuracies = ["acc1", "acc5", "mean_per_class_recall"]
    frozen = [f"{by}_{name}" for by in ("knn10", "lp") for name in accuracies]
    assert [*found] == [*recalls, "exact_match", *accuracies, *frozen]
    assert scores(tmp_path / "dp2") == scores(tmp_path / "tp2") == pytest.approx(found)
    assert scores(tmp_path / "sp2") == pytest.approx({name: found[name] for name in found if name != "exact_match"})
    assert found["exact_match"] == pytest.approx(5 / 11) and len({*found.values()}) > 4
    losses = [[{name: line[name] for name in line if name.startswith(("loss", "acc", "grad", "sample_hash"))}
               for line in metrics(run.out)] for run in (one, unscored)]  # fmt: skip
    assert losses[0] == losses[1]  # to the last bit: a validation leaves no trace in the training

    def of_tool(*arguments: str) -> dict[str, float]:
        settings = "--at_most", "12", "--device", "cpu", "--json", str(tmp_path / "scores.json")
        evaluate.main([str(Path(one.out, *SCORED)), *arguments, *settings])
        return json.loads((tmp_path / "scores.json").read_text())["metrics"]

    classes = ("--data", one.eval.classes, "--names", one.eval.class_names)
    by_tool = of_tool("retrieval", "--data", one.eval.retrieval) | of_tool("captions", "--data", one.eval.captions)
    by_tool |= of_tool("classes", *classes, "--templates", "shipped")
    for score in ("knn", "probe"):
        by_tool |= of_tool(score, *classes, "--train", one.eval.classes_train)
    assert by_tool == pytest.approx(found)


def test_what_is_scored_lies_at_equal_distances() -> None:
    assert [*spread(5, 0)] == [*spread(5, 5)] == [0, 1, 2, 3, 4]
    assert spread(10, 4) == [0, 2, 5, 7] and len(spread(10**6, 5000)) == 5000


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path, "run", zero_stage=1), init_from="")
    shutil.copy(tmp_path / "pairs.tar", tmp_path / "captions.tar")
    features = replace(config, objectives={}, eval=replace(config.eval, retrieval=""))
    assert prepare_run(features, ALONE).zero_shot is not None  # which any run has
    assert prepare_run(config, ALONE).zero_shot is not None
    assert prepare_run(replace(config, eval=replace(config.eval, every=0)), ALONE).zero_shot is None
    wrong = {
        "eval.classes needs eval.class_names": {"eval": replace(config.eval, class_names="")},
        "eval.templates: .*names.txt needs lines that have {}": {
            "eval": replace(config.eval, templates=config.eval.class_names)
        },
        "eval.retrieval is scored by contrast": {"objectives": {}},
        "eval.classes is scored by contrast": {
            "objectives": {}, "eval": replace(config.eval, retrieval="", classes_train=""),
        },
        "eval.captions is scored by prefix": {
            "objectives": {"contrastive": ContrastiveConfig()}, "eval": with_captions(config).eval,
        },
        "eval.captions: words are written one at a time": {
            "eval": with_captions(config).eval, "parallel": ParallelConfig(tensor=2, sequence=True),
        },
        "eval.retrieval: .*pipeline.* parallel.pipeline=1": {
            "parallel": ParallelConfig(pipeline=2, zero_stage=1), "batch": replace(config.batch, accumulation=2),
            "objectives": {"contrastive": ContrastiveConfig(negatives="micro_batch")},
        },
    }  # fmt: skip
    for told, change in wrong.items():
        layout: Any = change.get("parallel", config.parallel)
        ranks = layout.pipeline * layout.tensor
        mesh = replace(ALONE, world=ranks, pipeline=layout.pipeline, tensor=layout.tensor)
        with pytest.raises(ValueError, match=told):
            prepare_run(replace(config, **change), mesh)


def test_shipped_templates_have_a_place_for_the_name() -> None:
    assert read_templates("shipped", "") == TEMPLATES and len({*TEMPLATES}) == len(TEMPLATES) > 4
    assert all(template.count("{}") == 1 for template in TEMPLATES)
