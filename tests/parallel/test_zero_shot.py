"""Validations that score the model as it is: the same in every layout, and what tools/evaluate.py says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.config import BatchConfig, ParallelConfig, RunConfig
from beit3_dist.objectives.contrastive import ContrastiveConfig
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.preflight import prepare_run
from beit3_dist.tasks.data.zero_shot import TEMPLATES, read_templates
from tests.integration.runs import evaluations, run_config, train_in_turn, validated
from tests.parallel.workers import Workers
from tests.unit.tar_fixtures import picture, write_tar
from tools import evaluate

NAMES = ["red square", "green circle", "blue tree", "black dog", "white cat", "grey house"]
ALONE = Mesh(0, 1, 0, 1, torch.device("cpu"))


def config_of(folder: Path, out: str, **parallel: Any) -> RunConfig:
    """A short run of contrast with fast steps, so that vectors are no longer those of the beginning."""
    config = run_config(folder, steps=2, optim=replace(run_config(folder).optim, lr=0.01, warmup_steps=1))
    images = [{"__key__": str(n), "png": picture(n), "cls": str(n % 6).encode()} for n in range(15)]
    pairs = [{"__key__": str(n), "png": picture(n), "txt": f"a word {n}\n{n} more".encode()} for n in range(11)]
    if not (folder / "names.txt").exists():
        write_tar(folder / "classes.tar", images)
        write_tar(folder / "captions.tar", pairs)
        (folder / "names.txt").write_text("\n".join(NAMES))
    zero_shot = {"retrieval": folder / "captions.tar", "classes": folder / "classes.tar",
                 "class_names": folder / "names.txt"}  # fmt: skip
    held_out = replace(validated(config, every=2), **{name: str(path) for name, path in zero_shot.items()})
    batch = BatchConfig(images=0, texts=0, pairs=8)
    contrast: dict[str, Any] = {"contrastive": ContrastiveConfig(dim=24)}
    layout = ParallelConfig(**parallel)
    return replace(config, out=str(folder / out), objectives=contrast, batch=batch, eval=held_out, parallel=layout)


def scores(out: str | Path) -> dict[str, float]:
    """What the one validation of a run has found beside its loss."""
    (record,) = evaluations(out)
    return {
        name: value for name, value in record.items() if name != "step" and "contrastive" not in name and name != "loss"
    }


@pytest.mark.slow
def test_every_layout_scores_as_the_tool_does(tmp_path: Path) -> None:
    one = config_of(tmp_path, "one", zero_stage=1)
    with Workers(1) as workers:
        workers.run(train_in_turn, [one])
    with Workers(2) as workers:
        workers.run(train_in_turn, [config_of(tmp_path, "dp2", zero_stage=3)])
    with Workers(2, tensor=2) as workers:
        workers.run(train_in_turn, [config_of(tmp_path, "tp2", zero_stage=3, tensor=2, sequence=True)])
    found = scores(one.out)
    recalls = [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)]
    assert [*found] == [*recalls, "acc1", "acc5", "mean_per_class_recall"]
    assert scores(tmp_path / "dp2") == scores(tmp_path / "tp2") == pytest.approx(found)

    def of_tool(*arguments: str) -> dict[str, float]:
        evaluate.main([one.out, *arguments, "--device", "cpu", "--json", str(tmp_path / "scores.json")])
        return json.loads((tmp_path / "scores.json").read_text())["metrics"]

    by_tool = of_tool("retrieval", "--data", one.eval.retrieval)
    by_tool |= of_tool("classes", "--data", one.eval.classes, "--names", one.eval.class_names, "--templates", "shipped")
    assert by_tool == pytest.approx(found)


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", zero_stage=1)
    assert prepare_run(config, ALONE).zero_shot is not None
    assert prepare_run(replace(config, eval=replace(config.eval, every=0)), ALONE).zero_shot is None
    wrong = {
        "eval.classes needs eval.class_names": {"eval": replace(config.eval, class_names="")},
        "eval.templates: .*names.txt needs lines that have {}": {
            "eval": replace(config.eval, templates=config.eval.class_names)
        },
        "eval.retrieval is scored by contrast": {"objectives": {}},
        "eval.retrieval: .*pipeline.* parallel.pipeline=1": {
            "parallel": ParallelConfig(pipeline=2, zero_stage=1), "batch": replace(config.batch, accumulation=2),
            "objectives": {"contrastive": ContrastiveConfig(negatives="micro_batch")},
        },
    }  # fmt: skip
    for told, change in wrong.items():
        mesh = replace(ALONE, world=2, pipeline=2) if "parallel" in change else ALONE
        with pytest.raises(ValueError, match=told):
            prepare_run(replace(config, **change), mesh)


def test_shipped_templates_have_a_place_for_the_name() -> None:
    assert read_templates("shipped", "") == TEMPLATES and len({*TEMPLATES}) == len(TEMPLATES) > 4
    assert all(template.count("{}") == 1 for template in TEMPLATES)
