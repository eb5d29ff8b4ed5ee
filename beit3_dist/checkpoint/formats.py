"""Weights from and to other projects' forms, by what they are and not by what their file is called.

- released: unilm's .pth files, `{"model": {"beit3.encoder...": ...}}`
- torchscale: the state dict of torchscale's BEiT3, the same keys without `beit3.`
- timm: the state dict of timm's `beit3_*` vision models, and of its `vit_*` ones as a start
- a model folder: see model_folder.py
- a checkpoint of a training run, sharded or neutral: its master weights, or their moving average where it has one
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.checkpoint.files import sha256
from beit3_dist.checkpoint.find import checkpoint_of, damaged
from beit3_dist.checkpoint.fitting import check_whole, fit, infer_config, shapes_of
from beit3_dist.checkpoint.model_folder import (
    WEIGHTS,
    ModelFolder,
    config_of,
    is_model_folder,
    model_in,
    read_model_folder,
)
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.checkpoint.released import PREFIX, task_of, weights_from_released, weights_to_released
from beit3_dist.checkpoint.timm_form import weights_from_timm
from beit3_dist.config import ModelConfig, require
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.initialization import initial_value, materialize
from beit3_dist.opening import blaming, read_json, read_yaml
from beit3_dist.weights import read_weights_file, require_finite, state_dict_in


def _canonical(content: Any, source: str) -> dict[str, Tensor]:
    """The weights of a state dict of any of the forms, or of what holds it, under our names."""
    state = state_dict_in(content, source)
    require_finite(state.items(), source)
    with blaming(source, KeyError, IndexError, TypeError, RuntimeError):  # of shapes that no such model has
        if any(key.startswith(PREFIX) for key in state):
            return weights_from_released(state)
        if "encoder.embed_positions.A.weight" in state:
            return weights_from_released({PREFIX + key: value for key, value in state.items()})
        if {"pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state.keys():
            return weights_from_timm(state)
    raise ValueError(f"{source} has the keys neither of a released BEiT-3 file, nor of torchscale's, nor of timm's")


def _read_checkpoint(path: Path) -> ModelFolder:
    if damage := damaged(path):
        raise ValueError(damage)
    weights = read_weights(path, averaged=True)
    with blaming(f"{path / 'state.json'} describes no model of this version", TypeError):
        config = config_of(read_json(path / "state.json").get("model"))
    recipe = read_yaml(path / "config.yaml")
    try:
        tokenizer = Path(recipe.get("text_tokenizer") or "")
        task = task_of(weights, recipe["task"]) if "task" in recipe else None
        if task is not None:
            task["text_length"] = recipe["data"]["text_length"]
        objectives = () if "task" in recipe else tuple(map(str, recipe.get("objectives") or ()))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path / 'config.yaml'} is no run's config: {error!r}") from None
    return ModelFolder(config, weights, task, tokenizer if tokenizer.is_file() else None, objectives)


def read_source(path: Path, attention_heads: int | None = None, layer_norm_eps: float | None = None) -> ModelFolder:
    """Weights under our names with their config, from any of the forms above.

    `attention_heads`: of a single file of weights, which does not tell; known for the released widths.
    `layer_norm_eps`: the same; known for the released architecture. Raises
    FileNotFoundError or ValueError with one line where there is nothing, or nothing of these forms, or not all of it.
    A run's folder means its newest whole checkpoint.
    """
    path = checkpoint_of(path)
    if (path / "manifest.json").is_file():
        source = _read_checkpoint(path)
    elif is_model_folder(model_in(path)):
        source = read_model_folder(path)
    elif path.is_dir():
        raise ValueError(
            f"{path} is neither a model folder nor a checkpoint, nor the folder of a run that has one: name one, e.g. "
            "RUN/checkpoints/step_0000100"
        )
    else:
        weights = _canonical(read_weights_file(path), str(path))
        with blaming(str(path), TypeError):  # TypeError: a table that is a single number
            source = ModelFolder(
                infer_config(weights, attention_heads, layer_norm_eps), weights, task_of(weights), None
            )
    with blaming(str(path), RuntimeError):  # RuntimeError: a model of more elements than torch can count
        check_whole(source.weights, source.config)
    return source


def digest_of_source(path: Path) -> str:
    """SHA-256 of what `read_source` would read: of a checkpoint its manifest, which has the digests of its files.

    Raises FileNotFoundError or ValueError where there is nothing.
    """
    path = checkpoint_of(path)
    if path.is_dir():
        inside = "manifest.json" if (path / "manifest.json").is_file() else WEIGHTS
        path = (path if inside == "manifest.json" else model_in(path)) / inside
    return sha256(path)


def read_initial_weights(
    path: Path, config: ModelConfig, shapes: Mapping[str, torch.Size] | None = None
) -> dict[str, Tensor]:
    """What a run starts from (`init_from`): parameter -> float32, from any of the forms above.

    `shapes`: of the run's parameters where they are not the pretraining model's. Whole groups that the source lacks
    (heads, ...) are absent, which is logged; they keep their initial values. Raises ValueError with one line that names
    init_from and the file.
    """
    with blaming("init_from", OSError):
        source = read_source(path, config.heads, config.layer_norm_eps)
    return fit_initial(source.weights, source.config, config, shapes or shapes_of(config), str(path))


def fit_initial(
    weights: Mapping[str, Tensor],
    theirs: ModelConfig,
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    source: str,
) -> dict[str, Tensor]:
    """What a run takes of the weights of a model of the geometry `theirs`, as `read_initial_weights` does; they may lie
    on the meta device. `source`: what they are called."""
    with blaming("init_from"):
        for field in ("heads", "layer_norm_eps"):  # no shape tells these
            one, other = getattr(theirs, field), getattr(config, field)
            require(one == other, f"{source} has model.{field}={one}, this run has {other}")
        return fit(weights, config, shapes, source)


def load_released(path_or_dict: str | Path | Mapping[str, Any], config: ModelConfig) -> BEiT3:
    """A model on the CPU with the weights of a released state dict or file (or of any other of the forms above).

    What the file lacks as a whole has initial values, see `read_initial_weights`. Raises ValueError where it is another
    model's.
    """
    if isinstance(path_or_dict, (str, Path)):
        weights = read_initial_weights(Path(path_or_dict), config)
    else:
        source = "the given state dict"
        weights = fit(_canonical(path_or_dict, source), config, shapes_of(config), source)
    model = BEiT3(config, device="meta")
    materialize(
        model, lambda name, shape: weights[name] if name in weights else initial_value(name, shape, config, 0), "cpu"
    )
    return model


def to_released(model: BEiT3) -> dict[str, Tensor]:
    """The weights under the released keys and shapes. Raises ValueError for a model with VL experts."""
    return weights_to_released({name: p.detach().clone() for name, p in model.named_parameters()})
