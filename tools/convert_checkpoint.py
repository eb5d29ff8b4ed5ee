#!/usr/bin/env python3
"""Turns checkpoints and released weights into one another.

    python tools/convert_checkpoint.py SOURCE DESTINATION --to FORM [options]

SOURCE, recognised by its content: a checkpoint of a training run (RUN/checkpoints/step_NNNNNNN, or a neutral one), a
model folder, or a file (.pth, .safetensors) in the released, torchscale's, timm's or VLMo's form. FORM says what
DESTINATION, which is new, becomes:

    neutral      a folder: one entry per parameter, weight and moments; itself a checkpoint of any layout that
                 `--checkpoint.resume DESTINATION` takes. SOURCE must be a checkpoint of a training run.
    safetensors  a folder: model.safetensors, config.json, the text tokenizer. For inference and `--init_from`.
    released     a .pth file as unilm publishes them
    torchscale   a .pth or .safetensors file: the state dict of torchscale's BEiT3, which has no heads
    timm         a .pth or .safetensors file: the vision side for timm's beit3_* models; or a folder, which
                 timm.create_model("local-dir:DESTINATION", pretrained=True) loads
    vlmo         a .pth or .safetensors file: the state dict of unilm's vlmo, as its base plus has it
    hub          a folder for transformers: weights, config, processor, the code that trust_remote_code=True runs, and a
                 model card with the figures of the run. It is a model folder of ours, too. Needs the extra `hub`.
    onnx         a folder of graphs: the vision, text and fusion encoders and what the heads make of them, each for any
                 batch and padded texts, compared with torch by onnxruntime (1e-4). Needs the extra `hub`.
    torch_export the same as programs of torch.export

Notes of what a form leaves out go to standard error. A mistake is one line, exit code 2.
"""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from beit3_dist.command_line import log_to_console, refusing
from beit3_dist.config import require
from beit3_dist.opening import blaming, check_writable

log = logging.getLogger("beit3_dist.convert_checkpoint")

PROGRAM = "convert_checkpoint.py"
DTYPES = ("fp16", "fp32")
FORMS = ("neutral", "safetensors", "released", "torchscale", "timm", "vlmo", "hub", "onnx", "torch_export")
WITH_NAMES = ("safetensors", "hub")
"""Forms that hold a text tokenizer and the names of answers."""


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(
        PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--to", required=True, choices=FORMS)
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: as in SOURCE)")
    parser.add_argument("--image_size", type=int, help="interpolate the vision positions for images of this size")
    text = "drop: the encoder alone (default: keep)"
    parser.add_argument("--heads", choices=("keep", "drop"), default="keep", help=text)
    text = "of a file whose width is not a released model's: weights do not tell"
    parser.add_argument("--attention_heads", type=int, help=text)
    text = (
        "file of a VQA model's answers (or of a classifier's class names) for the model folder: one a line in the "
        "order of the labels, or unilm's answer2label.txt (default: the run's data.answers)"
    )
    parser.add_argument("--answers", type=Path, help=text)
    text = "SentencePiece file for the model folder (default: the run's, if it exists)"
    parser.add_argument("--text_tokenizer", type=Path, help=text)
    text = "of the model card, as the hub spells it (default: other)"
    parser.add_argument("--license", help=text)
    text = "--to onnx: beside each graph one with matrices in 8 bits for the CPU, and how far its results are off"
    parser.add_argument("--int8", action="store_true", help=text)
    options = parser.parse_args(list(arguments))
    with refusing(PROGRAM):
        convert(options)
    print(f"wrote {options.destination}")


def convert(options: Namespace) -> None:
    """Raises ValueError or OSError with one line where it cannot be done."""
    source, destination = options.source, options.destination
    require(not destination.exists(), f"{destination} already exists: remove it or choose another name")
    check_writable(destination.parent)
    if options.to in ("released", "torchscale", "vlmo") or (options.to == "timm" and destination.suffix):
        suffixes = (".pth", ".pt", ".bin", ".safetensors")
        words = f"{destination} is to be a file: its name ends with .pth or .safetensors"
        require(destination.suffix in suffixes, words)
        require(
            options.to != "released" or destination.suffix != ".safetensors",
            f"{destination}: the released form is a .pth file",
        )
    for name in ("text_tokenizer", "answers"):
        file = getattr(options, name)
        if file and options.to not in WITH_NAMES:
            places = " and --to ".join(WITH_NAMES)
            raise ValueError(f"--{name}: only --to {places} have a place for it, not --to {options.to}")
        if file and not file.is_file():
            raise ValueError(f"--{name}: there is no file {file}")
    require(options.license is None or options.to == "hub", "--license: only --to hub writes a model card")
    require(not options.int8 or options.to == "onnx", "--int8 is of --to onnx")
    if options.to == "neutral":
        _convert_to_neutral(options)
        return
    # torch takes seconds to import: a typo is reported before that.
    from beit3_dist.checkpoint.fitting import absent_groups, at_image_size, shapes_of, without_heads
    from beit3_dist.checkpoint.formats import read_source
    from beit3_dist.checkpoint.model_folder import save_model_folder
    from beit3_dist.checkpoint.released import weights_to_released, weights_to_torchscale
    from beit3_dist.checkpoint.timm_form import how_to_load, save_timm_folder, weights_to_timm
    from beit3_dist.checkpoint.vlmo_form import weights_to_vlmo
    from beit3_dist.data.text import TextTokenizer

    model = read_source(source, options.attention_heads)
    weights, config = model.weights, model.config
    if options.heads == "drop":
        weights, model = without_heads(weights), replace(model, task=None, objectives=())
    if options.image_size is not None:
        with blaming(f"--image_size {options.image_size}", RuntimeError, most=200):  # more than there is memory for
            weights, config = at_image_size(weights, config, options.image_size)
    weights = _in_precision(weights, options.dtype)
    for group in absent_groups(weights, shapes_of(config)):
        log.info("the result has no weights for %s", group)
    if options.to in WITH_NAMES:
        task = _with_answers(model.task, source, options.answers)
        tokenizer = options.text_tokenizer or model.text_tokenizer
        if tokenizer:  # a checkpoint may name any file
            TextTokenizer(str(tokenizer)).check_vocab(config.vocab_size)
        log.info("text tokenizer: %s", tokenizer or "none; --text_tokenizer FILE adds one")
        model = replace(model, config=config, weights=weights, task=task, text_tokenizer=tokenizer)
    if options.to == "safetensors":
        of_folder: dict[str, Any] = {"task": task, "text_tokenizer": tokenizer, "objectives": model.objectives}
        save_model_folder(destination, weights, config, **of_folder)
    elif options.to == "hub":
        card = _hub("card").card(model, source, destination.name, options.license or "other")
        _hub("folder").save_hub_folder(destination, model, card)
    elif options.to in ("onnx", "torch_export"):
        model = replace(model, config=config, weights=weights)
        _hub("export").save_exported(destination, model, options.to, options.int8)
    elif options.to == "released":
        _write(destination, {"model": weights_to_released(weights)})
    elif options.to == "torchscale":
        _write(destination, weights_to_torchscale(weights))
    elif options.to == "vlmo":
        _write(destination, weights_to_vlmo(weights, config))
    elif destination.suffix:
        timm = weights_to_timm(weights, config)
        log.info(how_to_load(config, timm))
        _write(destination, timm)
    else:
        from beit3_dist.tasks.base import HALF
        from beit3_dist.tasks.data.augmentation import IMAGENET

        classifies = model.task is not None and model.task["name"] == "imagenet"
        save_timm_folder(destination, weights, config, IMAGENET if classifies else HALF)


def _hub(module: str) -> Any:
    """A module of beit3_dist/hub. Raises ValueError where the packages of the extra are not installed."""
    from beit3_dist.optional import optional_module

    remedy = "pip install 'beit3-dist[hub]', with the torchvision that belongs to this torch"
    optional_module("transformers.image_utils", "--to hub, onnx or torch_export", remedy)
    return import_module(f"beit3_dist.hub.{module}")


def _with_answers(task: dict[str, Any] | None, source: Path, file: Path | None) -> dict[str, Any] | None:
    """What a model folder remembers of the task, with the names of its answers or classes: of the given file, else of
    the source, else of the file that the source's run read. A VQA model is of no use without: ValueError."""
    from beit3_dist.opening import read_yaml
    from beit3_dist.tasks.data.names import read_names
    from beit3_dist.tasks.registry import task_class, task_names

    if task is None or "classes" not in task:
        require(file is None, f"--answers: {source} has no head, or none is kept, that tells answers or classes apart")
        return task
    remedy = f"give --answers FILE with its {task['classes']} answers, one a line in the order of the labels"
    if file is None and task.get("answers"):
        return task
    if file is None and (source / "manifest.json").is_file():
        data = read_yaml(source / "config.yaml").get("data")
        file = Path(str(data.get("answers")) if isinstance(data, dict) else "")
        require(file.is_file(), f"the run of {source} read data.answers={file}, which is not there any more: {remedy}")
    if file is None and task["name"] in task_names() and task_class(task["name"]).keeps_names:
        raise ValueError(f"{source} does not name its answers: {remedy}, or unilm's answer2label.txt")
    if file is None:
        return task
    answers = read_names(file)
    if len(answers) != task["classes"]:
        raise ValueError(f"{file} names {len(answers)} answers, {source} tells {task['classes']} apart")
    return task | {"answers": answers}


def _convert_to_neutral(options: Namespace) -> None:
    from beit3_dist.checkpoint.neutral import write_neutral

    for name in ("dtype", "image_size", "attention_heads"):
        require(getattr(options, name) is None, f"--{name}: the neutral form holds the training state as it is")
    require(options.heads == "keep", "--heads drop: the neutral form holds the training state as it is")
    if not (options.source / "manifest.json").is_file():
        raise ValueError(
            f"{options.source} is no checkpoint of a training run (RUN/checkpoints/step_NNNNNNN), "
            "whose moments the neutral form holds; --to safetensors takes weights alone"
        )
    write_neutral(options.source, options.destination)


def _in_precision(weights: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """The weights as asked for. Raises ValueError where one is too large for fp16."""
    import torch

    if dtype is None:
        return weights
    converted = {n: value.to(torch.float16 if dtype == "fp16" else torch.float32) for n, value in weights.items()}
    for name, value in converted.items():
        if not torch.equal(value.isfinite(), weights[name].isfinite()):
            raise ValueError(f"--dtype fp16: {name} has values beyond {torch.finfo(torch.float16).max:.0f}")
    return converted


def _write(path: Path, content: dict[str, Any]) -> None:
    """A file that is whole or absent, in the format that its name ends with."""
    import torch

    from beit3_dist.checkpoint.files import replacing
    from beit3_dist.checkpoint.model_folder import save_safetensors

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        if path.suffix == ".safetensors":
            save_safetensors(aside, content)
        else:
            torch.save(content, aside)


def program(arguments: Sequence[str]) -> None:
    """As a program of its own: what is left out is told."""
    log_to_console()
    main(arguments)


if __name__ == "__main__":
    program(sys.argv[1:])
