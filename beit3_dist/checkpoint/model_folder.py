"""A model for use: weights with the config that they belong to, in one folder.

    FOLDER/
        config.json               format, model (the fields of ModelConfig), task (what its heads are for, or null)
        model.safetensors         canonical name -> weight
        tokenizer.spm             text tokenizer, where one was given

A downstream head's weights stand under `task_head.` and whatever name its own file gives them. Heads that a model does
not have are not in the file: an encoder alone is a model too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3_dist.checkpoint.files import sync, write_json
from beit3_dist.config import ModelConfig

FORMAT = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.spm"

TASK_HEAD = "task_head."
"""Where a downstream head's weights stand in a model that has one."""


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
    """The folder's SentencePiece file; None where it holds none."""


def save_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes contiguous tensors with the permissions of any new file: the library would make it its owner's alone."""
    path.touch()
    permissions = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(permissions)


def save_model_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    task: dict[str, Any] | None = None,
    text_tokenizer: Path | None = None,
) -> None:
    """Writes a new folder, whole or not at all. `task`: anything that JSON holds.

    Raises ValueError where the folder already exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} already exists: remove it or choose another folder")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_safetensors(partial / WEIGHTS, tensors)
    sync(partial / WEIGHTS)
    if text_tokenizer is not None:
        shutil.copyfile(text_tokenizer, partial / TOKENIZER)
        sync(partial / TOKENIZER)
    write_json(partial / CONFIG, {"format": FORMAT, "model": asdict(config), "task": task})
    partial.rename(folder)
    sync(folder.parent)


def is_model_folder(folder: Path) -> bool:
    """Whether a path looks like what `save_model_folder` writes."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read_model_folder(folder: Path) -> ModelFolder:
    """Raises FileNotFoundError or ValueError with one line that names the file."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no model folder: it has no {name}; tools/convert_checkpoint.py --to safetensors makes one"
            )
    try:
        content = json.loads((folder / CONFIG).read_text())
        written = content["format"]
        if written != FORMAT:
            raise ValueError(f"it has format {written}, this version reads {FORMAT}")
        config, task = ModelConfig(**content["model"]), content["task"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG} is not a config of ours: {error}") from error
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    tokenizer = folder / TOKENIZER
    return ModelFolder(config, weights, task, tokenizer if tokenizer.is_file() else None)
