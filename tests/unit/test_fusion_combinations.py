"""What a model with fusion layers and a decoder is combined with: it runs, or is refused by the name of the field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from beit3_dist.checkpoint.model_folder import ModelFolder
from beit3_dist.config import BatchConfig, DataConfig, EvalConfig, ModelConfig, ParallelConfig, RunConfig
from beit3_dist.inference import image_features
from beit3_dist.objectives.registry import OBJECTIVES, objectives_of
from beit3_dist.run.preflight import check_zero_shot
from beit3_dist.tasks.config import FinetuneConfig, TaskDataConfig
from beit3_dist.tasks.registry import task_class

FUSION = ModelConfig(layers=4, width=32, heads=4, ffn_width=48, patch_size=8, image_size=16, vocab_size=60,
                     visual_vocab_size=20, max_text_length=20, attention="per_modality", vl_expert_layers=0,
                     fusion_layers=2)  # fmt: skip
WRITER = replace(FUSION, decoder_layers=1)
PREFIX = "prefix_language_modeling"


def run(model: ModelConfig = WRITER, objectives: dict[str, dict[str, Any]] | None = None, **changes: Any) -> RunConfig:
    sections = {name: OBJECTIVES[name].Config(**fields) for name, fields in (objectives or {}).items()}
    data = DataConfig(images="i.tar", texts="t.tar", pairs="p.tar", text_length=20, caption_length=20)
    settings: dict[str, Any] = {
        "data": data,
        "image_tokenizer": "i",
        "objectives": sections,
        "batch": BatchConfig(images=1, texts=1, pairs=1),
    }
    return RunConfig(out="o", text_tokenizer="t", model=model, **settings | changes)


@pytest.mark.parametrize("model", [FUSION, WRITER], ids=["fusion", "decoder"])
def test_all_objectives_together_are_built(model: ModelConfig) -> None:
    names = [name for name in OBJECTIVES if name != "distillation"]  # which needs a teacher's file
    fields = {"image_classification": {"classes": 3}}
    objectives = objectives_of(run(model, {name: fields.get(name, {}) for name in names}))
    assert {objective.name for objective in objectives} == {*names}
    built = {name.split(".")[0] for name, _ in objectives.build().named_parameters()}
    assert ("decoder" in built) == (model is WRITER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": ParallelConfig(tensor=2, sequence=True)}, r"parallel\.sequence does not know"),
        ({"attention_kernel": "varlen"}, r"model\.fusion_layers=2: attention_kernel=varlen does not know attention of"),
        (
            {"train_only": ["!decoder.*"]},
            r"train_only freezes decoder\.\S+: with model\.fusion_layers, leave blocks out",
        ),
        ({"train_only": ["!blocks.0.*"]}, r"train_only freezes blocks\.0\.\S+: with model\.fusion_layers, leave"),
        ({"objectives": {PREFIX: {"texts": True}}}, r"prefix_language_modeling\.texts: the decoder of model\.decoder"),
    ],
)
def test_what_cannot_run_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives_of(run(**changes))


def test_a_validation_needs_a_decoder_to_write_captions() -> None:
    scored = EvalConfig(captions="p.tar")
    check_zero_shot(run(WRITER, {PREFIX: {}}, eval=scored))
    with pytest.raises(ValueError, match=r"eval\.captions: with model\.fusion_layers=2 a decoder writes: give model\."):
        check_zero_shot(run(FUSION, {PREFIX: {}}, eval=scored))


def test_layers_of_two_stacks_have_one_rate() -> None:
    tower = replace(WRITER, vision_layers=1, vision_width=48, vision_heads=4)
    task: dict[str, Any] = {
        "task": "retrieval",
        "out": "o",
        "text_tokenizer": "t",
        "data": TaskDataConfig(train="t", text_length=20),
    }
    FinetuneConfig(**task, model=WRITER, layer_decay=0.9)
    with pytest.raises(
        ValueError, match=r"layer_decay=0\.9 counts the layers of one stack, and model\.vision_layers=1"
    ):
        FinetuneConfig(**task, model=tower, layer_decay=0.9)


def test_images_have_features_without_the_decoder() -> None:
    """Of a model of a task that has no use of it."""
    network = task_class("vqa").network(WRITER, 3)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    assert not any(name.startswith("decoder.") for name in weights)
    content = ModelFolder(WRITER, weights, {"name": "vqa", "classes": 3}, None)
    assert image_features(content, "vqa", "cpu")([np.zeros((20, 20, 3), dtype=np.uint8)]).shape == (1, 32)
