"""A model folder that transformers loads, with or without this package: weights, config, processor, code and card."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from beit3_dist.checkpoint.files import folder_made_aside, write_text
from beit3_dist.checkpoint.fitting import absent_groups, check_whole, shapes_of
from beit3_dist.checkpoint.model_folder import (
    JSON_TOKENIZER,
    OBJECTIVE_HEADS,
    TASK_HEAD,
    TOKENIZER,
    WEIGHTS,
    ModelFolder,
    save_safetensors,
)
from beit3_dist.config import ModelConfig, require
from beit3_dist.data.json_tokenizer import JsonPieces
from beit3_dist.data.text import TextTokenizer
from beit3_dist.hub import (
    Beit3Config,
    Beit3ForCaptioning,
    Beit3ForImageClassification,
    Beit3ForPreTraining,
    Beit3ForRetrieval,
    Beit3ForSequenceClassification,
    Beit3ForVisualQuestionAnswering,
    Beit3ForVisualReasoning,
    Beit3ImageProcessor,
    Beit3Model,
    Beit3Processor,
    Beit3Tokenizer,
)
from beit3_dist.tasks.base import HALF
from beit3_dist.tasks.registry import task_class, task_names

CODE = ("configuration", "modeling", "tokenization", "image_processing", "processing", "pipelines")
HEADS: dict[str, type[Beit3Model]] = {
    "imagenet": Beit3ForImageClassification,
    "vqa": Beit3ForVisualQuestionAnswering,
    "nlvr2": Beit3ForVisualReasoning,
    "captioning": Beit3ForCaptioning,
    "text": Beit3ForSequenceClassification,
    "text_classification": Beit3ForSequenceClassification,
    "retrieval": Beit3ForRetrieval,
    "itc": Beit3ForRetrieval,
    "imagenet_retrieval": Beit3ForRetrieval,
    "retrieval_matching": Beit3ForRetrieval,  # its vectors
}
"""Task -> the model of its fine-tuned head."""
AUTO = {
    Beit3ForPreTraining: ("AutoModelForPreTraining", "AutoModelForMaskedLM"),
    Beit3ForImageClassification: ("AutoModelForImageClassification",),
    Beit3ForVisualQuestionAnswering: ("AutoModelForVisualQuestionAnswering",),
    Beit3ForVisualReasoning: ("AutoModelForSequenceClassification",),
    Beit3ForSequenceClassification: ("AutoModelForSequenceClassification",),
    Beit3ForCaptioning: ("AutoModelForImageTextToText",),
    Beit3ForRetrieval: ("AutoModelForZeroShotImageClassification",),
}
PIPELINES = {  # of models that transformers 5 has no pipeline for
    Beit3ForVisualQuestionAnswering: ("visual-question-answering", "Beit3VisualQuestionAnsweringPipeline"),
    Beit3ForCaptioning: ("image-to-text", "Beit3ImageToTextPipeline"),
}

log = logging.getLogger(__name__)


def models_of(model: ModelFolder) -> list[type[Beit3Model]]:
    """The models with a head that a folder's weights serve, the one that they are saved for first. Raises ValueError
    for a task that has none."""
    if model.task is not None:
        name = str(model.task["name"])
        require(name in HEADS, f"--to hub has no model for the task {name}: its tasks are {', '.join(HEADS)}")
        return [HEADS[name]]
    found: list[type[Beit3Model]] = []
    if {"text_head.weight", "image_head.weight"} <= model.weights.keys():
        found.append(Beit3ForPreTraining)
    if f"{OBJECTIVE_HEADS}contrastive.logit_scale" in model.weights:
        found.append(Beit3ForRetrieval)
    if "prefix_language_modeling" in model.objectives and "text_head.weight" in model.weights:
        found.append(Beit3ForCaptioning)
    return found or [Beit3Model]


def config_for(model: ModelFolder) -> Beit3Config:
    """Raises ValueError for a model that this form does not hold."""
    geometry, usual = asdict(model.config), asdict(ModelConfig())
    known = vars(Beit3Config())
    for name in [name for name in geometry if name not in known]:  # fusion layers, a decoder, towers of their own
        value = geometry.pop(name)
        require(value == usual[name], f"model.{name}={value}: --to hub holds no such model; --to safetensors does")
    absent = [g for g in absent_groups(model.weights, shapes_of(model.config)) if "head" not in g and "norm" not in g]
    require(not absent, f"--to hub needs a whole model, this one has no weights for {', '.join(absent)}")
    task, heads = model.task or {}, models_of(model)
    head = TASK_HEAD if model.task else f"{OBJECTIVE_HEADS}contrastive."
    vectors = model.weights.get(f"{head}vision_head.weight")
    longest = geometry["max_text_length"]
    length = task_class(task["name"]).usual_text_length if task else None
    config = Beit3Config(
        **geometry,
        final_norm=any(name.startswith("norm.") for name in model.weights),
        task=task.get("name"),
        text_length=task.get("text_length") or min(length or longest, longest),
        objectives=[] if task else [*model.objectives],
        projection_dim=None if vectors is None else len(vectors),
        contrast_bias=f"{head}logit_bias" in model.weights,
        architectures=[heads[0].__name__],
        dtype=str(next(iter(model.weights.values())).dtype).removeprefix("torch."),
    )
    if classes := task.get("classes"):
        names = task.get("answers") or [f"LABEL_{number}" for number in range(classes)]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    elif heads[0] is Beit3ForVisualReasoning:
        config.id2label, config.label2id = {0: "False", 1: "True"}, {"False": 0, "True": 1}
    config.auto_map = {"AutoConfig": "configuration_beit3.Beit3Config", "AutoModel": "modeling_beit3.Beit3Model"}
    for kind in heads:
        config.auto_map |= {auto: f"modeling_beit3.{kind.__name__}" for auto in AUTO.get(kind, ())}
    config.custom_pipelines = {
        name: {"impl": f"pipelines_beit3.{pipeline}", "pt": list(AUTO[kind]), "type": "multimodal"}
        for kind, (name, pipeline) in PIPELINES.items()
        if kind in heads
    }
    return config


def save_hub_folder(folder: Path, model: ModelFolder, card: str) -> None:
    """Writes a new folder, whole or not at all. `card`: its README.md. Raises ValueError where the folder exists, or
    the model is one that this form does not hold."""
    config = config_for(model)
    check_whole(model.weights, model.config)
    for kind in models_of(model):
        with torch.device("meta"):
            needed = kind(config).state_dict()
        for name, value in needed.items():
            if name not in model.weights or model.weights[name].shape != value.shape:
                raise ValueError(f"{kind.__name__} needs {name} {list(value.shape)}, which is not there")
    with folder_made_aside(folder) as partial:
        weights = {name: value.detach().cpu().contiguous() for name, value in model.weights.items()}
        save_safetensors(partial / WEIGHTS, weights)
        config.save_pretrained(partial)
        _save_processor(partial, model, config)
        if Beit3ForCaptioning in models_of(model):
            generation_config(config).save_pretrained(partial)
        for name in CODE:
            shutil.copyfile(str(files(__package__) / f"{name}_beit3.py"), partial / f"{name}_beit3.py")
        write_text(partial / "README.md", card)


def _save_processor(folder: Path, model: ModelFolder, config: Beit3Config) -> None:
    task: Any = task_class(str(config.task)) if config.task in task_names() else None
    mean, deviation = HALF if task is None else task.statistics
    images = Beit3ImageProcessor(
        {"height": config.image_size, "width": config.image_size},
        do_center_crop=task is not None and task.evaluation == "centre",
        image_mean=mean,
        image_std=deviation,
    )
    images.save_pretrained(folder)
    if model.text_tokenizer is None:
        log.warning("without a text tokenizer the folder has no AutoProcessor: --text_tokenizer FILE adds one")
        return
    file = TextTokenizer(str(model.text_tokenizer))
    file.check_vocab(config.vocab_size)
    tokenizer: Any
    if isinstance(file.file, JsonPieces):
        write_text(folder / JSON_TOKENIZER, file.file.content)
        names = {f"{role}_token": token for role, token in file.file.specials.items()}
        inputs = ["input_ids", "attention_mask"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / JSON_TOKENIZER), model_max_length=config.text_length,
            model_input_names=inputs, clean_up_tokenization_spaces=False, **names,
        )  # fmt: skip
    else:
        shutil.copyfile(file.path, folder / TOKENIZER)
        tokenizer = Beit3Tokenizer(str(folder / TOKENIZER), model_max_length=config.text_length)
    Beit3Processor(images, tokenizer).save_pretrained(folder)


def generation_config(config: Beit3Config) -> GenerationConfig:
    """unilm's search: three beams, length penalty 0.6. Only words and </s> are written."""
    assert config.text_length is not None
    unwritten = [0, 1, 3, *range(config.mask_token_id, config.vocab_size)]
    return GenerationConfig(
        bos_token_id=0, pad_token_id=1, eos_token_id=2, suppress_tokens=unwritten, renormalize_logits=True, num_beams=3,
        length_penalty=0.6, early_stopping="never", max_new_tokens=config.text_length - 1,
    )  # fmt: skip
