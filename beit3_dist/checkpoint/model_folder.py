"""A model for use: weights with the config that they belong to, in one folder.

    FOLDER/
        config.json               format, model (the fields of ModelConfig), task (what its heads are for, or null),
                                  objectives (names of those that pretraining had, which say what it can do as it is)
        model.safetensors         canonical name -> weight
        tokenizer.spm             text tokenizer, where one was given; tokenizer.json where it is one of Hugging Face's

A downstream head's weights stand under `task_head.` and whatever name its own file gives them. Heads that a model does
not have are not in the file: an encoder alone is a model too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from beit3_dist.checkpoint.files import folder_made_aside, sync, write_json
from beit3_dist.config import ModelConfig, Sharing, require
from beit3_dist.opening import blaming, is_json_object, open_regular, read_json
from beit3_dist.weights import read_weights_file, require_finite

FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER, JSON_TOKENIZER = "tokenizer.spm", "tokenizer.json"

HUB = "beit3"
"""`model_type` in a config of transformers: a folder of `--to hub` is a model folder, too, with the same weights."""
MOST = 1 << 24
"""The largest number that a file may describe a model by: torch cannot count the elements of much larger ones."""

TASK_HEAD = "task_head."
"""Where a downstream head's weights stand in a model that has one."""
OBJECTIVE_HEADS = "objective_heads."
"""Before the name of a pretraining objective: where the weights of the head that it has of its own stand."""


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds."""

    config: ModelConfig
    """The geometry."""
    weights: dict[str, Tensor]
    """Canonical name -> weight on the CPU, in the precision of the file."""
    task: dict[str, Any] | None
    """What the task's own code wrote about its head; None where there is no head."""
    text_tokenizer: Path | None
    """The folder's tokenizer file; None where it holds none."""
    objectives: tuple[str, ...] = ()
    """Pretraining objectives that it was trained by; none of a model with a task, or where nobody knows."""


def save_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes contiguous tensors with the permissions of any new file: the library would make it its owner's alone.

    Raises OSError where the disk does not take them.
    """
    path.touch()
    permissions = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # the library has it in its words alone
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(permissions)


def save_model_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    task: dict[str, Any] | None = None,
    text_tokenizer: Path | None = None,
    objectives: Iterable[str] = (),
) -> None:
    """Writes a new folder, whole or not at all. `task`: anything that JSON holds.

    Raises ValueError where the folder already exists.
    """
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    content = {"format": FORMAT, "model": asdict(config), "task": task, "objectives": [*objectives]}
    with folder_made_aside(Path(folder)) as partial:
        save_safetensors(partial / WEIGHTS, tensors)
        sync(partial / WEIGHTS)
        if text_tokenizer is not None:
            copy = partial / tokenizer_name(text_tokenizer)
            shutil.copyfile(text_tokenizer, copy)
            sync(copy)
        write_json(partial / CONFIG, content)


def tokenizer_name(file: Path) -> str:
    """What a tokenizer's file is called in a model folder. JSON begins with a brace, which no SentencePiece does."""
    with open_regular(file) as opened:
        return JSON_TOKENIZER if is_json_object(opened.read(1 << 10)) else TOKENIZER


def config_of(fields: Any) -> ModelConfig:
    """The config that a file describes. Raises ValueError or TypeError for an unknown field or one of another type."""
    for name, value in asdict(ModelConfig()).items():
        given = fields.get(name, value) if isinstance(fields, dict) else None
        if type(given) is not type(value) and not (isinstance(value, float) and type(given) is int):
            raise ValueError(f"model.{name}={given!r} is no {type(value).__name__}")
        if type(given) is int and given > MOST:
            raise ValueError(f"model.{name}={given} is more than {MOST}")
    config = ModelConfig(**fields)
    for name in ("attention", "ffn"):
        if getattr(config, name) not in get_args(Sharing):
            raise ValueError(f"model.{name}={getattr(config, name)!r} is not known")
    return config


def _from_hub(content: dict[str, Any]) -> dict[str, Any]:
    """What the config of `--to hub` says, or of a model that was fine-tuned from it in transformers, as ours does."""
    labels = [content.get("id2label", {})[str(number)] for number in range(len(content.get("id2label", {})))]
    named = any(label != f"LABEL_{number}" for number, label in enumerate(labels))
    task = None if content["task"] is None else {"name": content["task"], "text_length": content["text_length"]}
    if task is not None and labels:
        task |= {"classes": len(labels), "answers": labels if named else []}
    model = {name: content[name] for name in asdict(ModelConfig()) if name in content}
    return {"format": FORMAT, "model": model, "task": task, "objectives": content["objectives"]}


def block_count(names: Iterable[str]) -> int:
    """Blocks of which there are weights."""
    return len({name.split(".")[1] for name in names if re.match(r"blocks\.\d+\.", name)})


def check_blocks(weights: Iterable[str], config: ModelConfig) -> None:
    """Raises ValueError where the config has other blocks than the weights: a model makes its blocks one by one, as
    many as a file claims."""
    there = block_count(weights)
    require(there == config.layers, f"model.layers={config.layers}, but there are weights of {there} blocks")


def is_model_folder(folder: Path) -> bool:
    """Whether a path looks like what `save_model_folder` writes."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def model_in(folder: Path) -> Path:
    """The model folder that a path means: RUN/model of the folder of a fine-tuning run, else itself."""
    of_run = folder / "model"
    return of_run if is_model_folder(of_run) and not is_model_folder(folder) else folder


def read_model_folder(folder: Path) -> ModelFolder:
    """The model of a folder, or of RUN/model for a run's folder. Raises FileNotFoundError or ValueError with one line
    that names the file."""
    folder = model_in(Path(folder))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            if (folder / "checkpoints").is_dir():
                raise FileNotFoundError(
                    f"{folder} is a run's folder without a model: fine-tuning writes {folder / 'model'} after its last "
                    f"step, and tools/convert_checkpoint.py {folder} MODEL --to safetensors makes one of any run"
                )
            raise FileNotFoundError(
                f"{folder} is no model folder: it has no {name}; tools/convert_checkpoint.py --to safetensors makes one"
            )
    content, weights = read_json(folder / CONFIG), read_weights_file(folder / WEIGHTS)
    require_finite(weights.items(), str(folder / WEIGHTS))
    with blaming(f"{folder / CONFIG} is not a config of ours", TypeError, KeyError, AttributeError):
        if content.get("model_type") == HUB:
            content = _from_hub(content)
        written = content["format"]
        require(written == FORMAT, f"it has format {written}, this version reads {FORMAT}")
        config, task = config_of(content["model"]), content["task"]
        require(isinstance(task, dict | None), "its task is no object")
        objectives = content.get("objectives", [])
        if not isinstance(objectives, list) or not all(isinstance(name, str) for name in objectives):
            raise ValueError("its objectives are no list of names")
    found = next((path for name in (TOKENIZER, JSON_TOKENIZER) if os.path.lexists(path := folder / name)), None)
    return ModelFolder(config, weights, task, found, tuple(objectives))
