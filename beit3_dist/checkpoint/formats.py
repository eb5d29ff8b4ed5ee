"""Weights in other projects' layouts. Here: the released single-file form of unilm and torchscale."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.model.beit3 import BEiT3

_SIDE = {"vision": "A", "language": "B"}
_BLOCK_RULES = [  # our name below `blocks.{i}.` -> released name below `beit3.encoder.layers.{i}.`; {e} is A or B
    (r"attention_norm\.(vision|language)\.(\w+)", "self_attn_layer_norm.{e}.{leaf}"),
    (r"attention\.(q|k|v|out)\.(vision|language)\.(\w+)", "self_attn.{part}_proj.{e}.{leaf}"),
    (r"attention\.inner_norm\.(vision|language)\.(\w+)", "self_attn.inner_attn_ln.{e}.{leaf}"),
    (r"ffn\.(vision|language)\.norm\.(\w+)", "final_layer_norm.{e}.{leaf}"),
    (r"ffn\.(vision|language)\.(fc1|fc2)\.(\w+)", "ffn.{e}.{part}.{leaf}"),
    (r"ffn\.(vision|language)\.inner_norm\.(\w+)", "ffn.{e}.ffn_layernorm.{leaf}"),
]
_OTHER_NAMES = {
    "vision_embedding.projection.weight": "beit3.vision_embed.proj.weight",
    "vision_embedding.projection.bias": "beit3.vision_embed.proj.bias",
    "vision_embedding.cls_token": "beit3.vision_embed.cls_token",
    "vision_embedding.mask_token": "beit3.vision_embed.mask_token",
    "vision_embedding.positions": "beit3.encoder.embed_positions.A.weight",
    "language_embedding.words.weight": "beit3.text_embed.weight",
    "language_embedding.positions": "beit3.encoder.embed_positions.B.weight",
    "image_head.weight": "mim_head.weight",
    "image_head.bias": "mim_head.bias",
    "text_head.weight": "mlm_head.weight",
    "text_head.bias": "mlm_head.bias",
}


def released_name(name: str) -> str:
    """The released key of a parameter of the released architecture."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    if match := re.fullmatch(r"norm\.(vision|language)\.(\w+)", name):
        return f"beit3.encoder.layer_norm.{_SIDE[match[1]]}.{match[2]}"
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        for pattern, target in _BLOCK_RULES:
            if match := re.fullmatch(pattern, block[2]):
                side = next(_SIDE[g] for g in match.groups() if g in _SIDE)
                rest = [g for g in match.groups() if g not in _SIDE]
                return f"beit3.encoder.layers.{block[1]}." + target.format(e=side, leaf=rest[-1], part=rest[0])
    raise ValueError(f"{name} has no place in the released format: it holds per-modality attention and no VL expert")


def _released_shape(name: str, shape: torch.Size, config: ModelConfig) -> tuple[int, ...]:
    if name == "vision_embedding.projection.weight":
        return shape[0], 3, config.patch_size, config.patch_size
    if name in ("vision_embedding.cls_token", "vision_embedding.mask_token"):
        return 1, 1, shape[0]
    return tuple(shape)


def to_released(model: BEiT3) -> dict[str, Tensor]:
    """The weights under the released key names and shapes. Raises ValueError for a shared-attention model."""
    return {
        released_name(name): p.detach().reshape(_released_shape(name, p.shape, model.config)).clone()
        for name, p in model.named_parameters()
    }


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"init_from: there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"init_from: {path} is not a file of tensors that torch can read: {reason}") from error


def read_released(path_or_dict: str | Path | Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(our name, value) for every parameter of `config`'s model, from a released state dict or .pth file.

    Raises ValueError with the missing or misshapen key's name; keys without a place here (task heads) are ignored.
    """
    if isinstance(path_or_dict, (str, Path)):
        source, content = str(path_or_dict), _read_file(Path(path_or_dict))
    else:
        source, content = "the given state dict", path_or_dict
    weights: Mapping[str, Any] = content.get("model", content)
    for name, parameter in BEiT3(config, device="meta").named_parameters():
        key = released_name(name)
        if key not in weights:
            raise ValueError(
                f"init_from: {source} has no {key}: it is not a BEiT-3 pretraining checkpoint of this architecture"
            )
        shape = _released_shape(name, parameter.shape, config)
        if tuple(weights[key].shape) != shape:
            raise ValueError(
                f"init_from: {key} in {source} has shape {list(weights[key].shape)}, the model needs {list(shape)}"
            )
        yield name, weights[key].float().reshape(parameter.shape)


def load_released(path_or_dict: str | Path | Mapping[str, Tensor], config: ModelConfig) -> BEiT3:
    """A model on the CPU with the weights of a released state dict or .pth file; see `read_released`."""
    model = BEiT3(config, device="meta")
    model.load_state_dict(dict(read_released(path_or_dict, config)), assign=True)
    return model
