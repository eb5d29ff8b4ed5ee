"""Weights from and to other projects' forms, by what they are and not by what their file is called.

- released: unilm's .pth files, `{"model": {"beit3.encoder...": ...}}`
- torchscale: the state dict of torchscale's BEiT3, the same keys without `beit3.`
- timm: the state dict of timm's `beit3_*` vision models, and of its `vit_*` ones as a start
- VLMo: the state dict of unilm's vlmo, as far as the model has a place for it (vlmo_form.py)
- BERT: the state dict of Hugging Face's BertModel, as a start of words' layers alone (bert_form.py)
- a model folder: see model_folder.py
- a checkpoint of a training run, sharded or neutral: its master weights, or their moving average where it has one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.checkpoint.bert_form import WITHOUT_BERT, is_bert, weights_from_bert
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
from beit3_dist.checkpoint.vlmo_form import is_vlmo, weights_from_vlmo
from beit3_dist.config import ModelConfig, require
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.initialization import initial_value, materialize
from beit3_dist.opening import blaming, read_json, read_yaml
from beit3_dist.weights import read_weights_file, require_finite, state_dict_in


def _canonical(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights of a state dict of any of the forms under our names."""
    with blaming(source, KeyError, IndexError, TypeError, RuntimeError):  # of shapes that no such model has
        if any(key.startswith(PREFIX) for key in state):
            return weights_from_released(state)
        if "encoder.embed_positions.A.weight" in state:
            return weights_from_released({PREFIX + key: value for key, value in state.items()})
        if {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state.keys():
            return weights_from_timm(state)
        if is_vlmo(state):
            return weights_from_vlmo(state)
    require(
        not is_bert(state),
        f"{source} holds BERT's weights, which are a start of words' layers alone: name it in init_from",
    )
    raise ValueError(f"{source} has the keys neither of a released BEiT-3 file, nor of torchscale's, timm's or VLMo's")


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


def _state_of(content: Any, source: str) -> dict[str, Tensor]:
    """The state dict that a file holds, of finite numbers."""
    state = state_dict_in(content, source)
    require_finite(state.items(), source)
    return state


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
        return _source_of(_state_of(read_weights_file(path), str(path)), str(path), attention_heads, layer_norm_eps)
    return _whole(source, str(path))


def _source_of(
    state: Mapping[str, Tensor], name: str, attention_heads: int | None, layer_norm_eps: float | None
) -> ModelFolder:
    """The model of a state dict."""
    weights = _canonical(state, name)
    with blaming(name, TypeError):  # TypeError: a table that is a single number
        config = infer_config(weights, attention_heads, layer_norm_eps)
        return _whole(ModelFolder(config, weights, task_of(weights), None), name)


def _whole(source: ModelFolder, name: str) -> ModelFolder:
    with blaming(name, RuntimeError):  # RuntimeError: a model of more elements than torch can count
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
    paths: Path | str | Sequence[str], config: ModelConfig, shapes: Mapping[str, torch.Size] | None = None
) -> dict[str, Tensor]:
    """What a run starts from (`init_from`): parameter -> float32, from any of the forms above; of several sources, from
    the first that has it.

    `shapes`: of the run's parameters where they are not the pretraining model's. Whole groups that a source lacks
    (heads, ...) are absent, which is logged; what all lack keeps its initial values. Raises ValueError with one line
    that names init_from and the file.
    """
    weights: dict[str, Tensor] = {}
    for path in [paths] if isinstance(paths, Path | str) else paths:
        weights = _read_one(checkpoint_of(Path(path)), config, shapes or shapes_of(config)) | weights
    return weights


def _read_one(path: Path, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    heads = config.vision_heads or config.heads  # of a file of images alone, where these have an encoder of their own
    with blaming("init_from", OSError):
        if path.is_dir():
            source = read_source(path)
        else:
            state = _state_of(read_weights_file(path), str(path))
            if is_bert(state):
                with blaming(str(path), KeyError, IndexError, TypeError, RuntimeError):  # of shapes that BERT has not
                    weights = weights_from_bert(state, config)
                return fit(weights, config, shapes, str(path), WITHOUT_BERT)
            source = _source_of(state, str(path), heads, config.layer_norm_eps)
    return fit_initial(source.weights, source.config, config, shapes, str(path))


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
        own = config.of_vision if config.vision_layers and not theirs.fusion_layers else config
        for field in ("heads", "layer_norm_eps"):  # no shape tells these
            one, other = getattr(theirs, field), getattr(own, field)
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
        weights = fit(_canonical(_state_of(path_or_dict, source), source), config, shapes_of(config), source)
    model = BEiT3(config, device="meta")
    materialize(
        model, lambda name, shape: weights[name] if name in weights else initial_value(name, shape, config, 0), "cpu"
    )
    return model


def to_released(model: BEiT3) -> dict[str, Tensor]:
    """The weights under the released keys and shapes. Raises ValueError for a model with VL experts."""
    return weights_to_released({name: p.detach().clone() for name, p in model.named_parameters()})
