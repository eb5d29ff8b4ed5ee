"""The README.md of a folder for a hub: what the model is, what its run has measured, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from beit3_dist.checkpoint.find import checkpoint_of
from beit3_dist.checkpoint.model_folder import ModelFolder, model_in
from beit3_dist.data.text_files import read_records
from beit3_dist.opening import read_yaml

USES = {  # task -> the hub's tag of it, and the call that shows it
    "imagenet": ("image-classification", 'pipeline("image-classification", FOLDER)("photo.jpg")'),
    "vqa": (
        "visual-question-answering",
        'pipeline("visual-question-answering", FOLDER, trust_remote_code=True)("photo.jpg", "what is this?")',
    ),
    "captioning": ("image-to-text", 'pipeline("image-to-text", FOLDER, trust_remote_code=True)("photo.jpg")'),
    "retrieval": (
        "zero-shot-image-classification",
        'pipeline("zero-shot-image-classification", FOLDER)("photo.jpg", candidate_labels=["a cat", "a dog"])',
    ),
    "text": ("text-classification", 'pipeline("text-classification", FOLDER)("a sentence")'),
    "nlvr2": ("text-classification", "AutoModelForSequenceClassification.from_pretrained(FOLDER)"),
}
USES |= {name: USES["retrieval"] for name in ("itc", "imagenet_retrieval", "retrieval_matching")}
USES["text_classification"] = USES["text"]
FEATURES = ("image-feature-extraction", 'pipeline("image-feature-extraction", FOLDER)("photo.jpg")')


def run_of(source: Path) -> Path | None:
    """The run's folder that a checkpoint or a run's model lies in; None of what lies elsewhere."""
    place = model_in(checkpoint_of(source)).resolve()
    folders = (place, *place.parents[:2])
    return next((f for f in folders if (f / "config.yaml").is_file() and (f / "metrics.jsonl").is_file()), None)


def figures_of(run: Path) -> dict[str, float]:
    """The last validation's figures of a run, and its step; none of a run without one."""
    file = run / "eval.jsonl"
    records = [record for _, record in read_records(file)] if file.is_file() else []
    last = records[-1] if records else {}
    return {name: value for name, value in last.items() if type(value) in (int, float) and isfinite(value)}


def card(model: ModelFolder, source: Path, name: str, license: str) -> str:
    """README.md of a model that was read from `source` and is called `name`. `license`: as the hub spells it."""
    run = run_of(source)
    figures = {} if run is None else figures_of(run)
    task = str(model.task["name"]) if model.task else None
    tag, call = USES.get(task or "", FEATURES)
    front: dict[str, Any] = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": tag,
        "tags": ["beit3", "vision-language", *([task] if task else model.objectives)],
    }
    measured = {metric: value for metric, value in figures.items() if metric != "step"}
    if measured:
        metrics = [{"type": metric, "value": value} for metric, value in measured.items()]
        what = {"task": {"type": tag}, "dataset": {"name": "the run's validation", "type": "validation"}}
        front["model-index"] = [{"name": name, "results": [what | {"metrics": metrics}]}]
    config = model.config
    geometry = {
        "parameters": f"{sum(weight.numel() for weight in model.weights.values()) / 1e6:,.1f}M",
        "layers, width, heads": f"{config.layers}, {config.width}, {config.heads}",
        "images": f"{config.image_size} x {config.image_size} pixels, patches of {config.patch_size}",
        "attention, experts": f"{config.attention}, {config.ffn}, vision-language in {config.vl_expert_layers} layers",
        "task": task or f"none; pretrained by {', '.join(model.objectives) or 'objectives that are not known'}",
    }
    trained = [] if run is None else ["## Training", "", _table(_training(run) | figures), ""]
    loading = ["import beit3_dist.hub  # or trust_remote_code=True", "from transformers import AutoModel, pipeline"]
    if "AutoModelFor" in call:
        loading[1] = "from transformers import AutoModel, AutoModelForSequenceClassification"
    return "\n".join(
        [
            "---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", "",
            f"# {name}", "",
            "A BEiT-3 (Wang et al. 2022): one Multiway Transformer for images, texts and pairs.", "",
            _table(geometry), "",
            *trained,
            "## Use", "", "```python", *loading, "", f'FOLDER = "{name}"',
            "AutoModel.from_pretrained(FOLDER)  # the encoder", call, "```", "",
            "The folder is a model folder of beit3_dist, too: `beit3_dist.inference.Model.load(FOLDER)`.", "",
        ]
    )  # fmt: skip


def _training(run: Path) -> dict[str, Any]:
    """What a reader asks of a run's config."""
    recipe = read_yaml(run / "config.yaml")
    batch = recipe.get("batch")
    samples = {f"batch, {n}": v for n, v in batch.items()} if isinstance(batch, dict) else {"batch": batch}
    told = {name: recipe.get(name) for name in ("steps", "epochs", "precision", "seed")} | samples
    return {name: value for name, value in told.items() if value}


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {f'{value:.5g}' if isinstance(value, float) else value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
