"""The released form of BEiT-3 (unilm's .pth files; torchscale's state dict is the same without `beit3.`).

It has per-modality attention and no VL expert: our `vision` is its branch A, `language` its branch B. The heads of
pretraining have a place in our model; those of fine-tuned models keep their released names under `task_head.`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from beit3_dist.checkpoint.model_folder import OBJECTIVE_HEADS, TASK_HEAD

PREFIX = "beit3."

_BLOCK_MODULES = {  # ours below `blocks.{i}.` -> released below `beit3.encoder.layers.{i}.`; * is the side
    "attention_norm.*": "self_attn_layer_norm.*",
    "attention.q.*": "self_attn.q_proj.*",
    "attention.k.*": "self_attn.k_proj.*",
    "attention.v.*": "self_attn.v_proj.*",
    "attention.inner_norm.*": "self_attn.inner_attn_ln.*",
    "attention.out.*": "self_attn.out_proj.*",
    "ffn.*.norm": "final_layer_norm.*",
    "ffn.*.fc1": "ffn.*.fc1",
    "ffn.*.inner_norm": "ffn.*.ffn_layernorm",
    "ffn.*.fc2": "ffn.*.fc2",
}
_SIDES = {"vision": "A", "language": "B"}
_IN_BLOCK = {
    f"{ours.replace('*', side)}.{leaf}": f"{released.replace('*', branch)}.{leaf}"
    for ours, released in _BLOCK_MODULES.items()
    for side, branch in _SIDES.items()
    for leaf in ("weight", "bias")
}
_OUTSIDE = {
    "vision_embedding.projection.weight": "beit3.vision_embed.proj.weight",
    "vision_embedding.projection.bias": "beit3.vision_embed.proj.bias",
    "vision_embedding.cls_token": "beit3.vision_embed.cls_token",
    "vision_embedding.mask_token": "beit3.vision_embed.mask_token",
    "vision_embedding.positions": "beit3.encoder.embed_positions.A.weight",
    "language_embedding.words.weight": "beit3.text_embed.weight",
    "language_embedding.positions": "beit3.encoder.embed_positions.B.weight",
    "norm.vision.weight": "beit3.encoder.layer_norm.A.weight",
    "norm.vision.bias": "beit3.encoder.layer_norm.A.bias",
    "norm.language.weight": "beit3.encoder.layer_norm.B.weight",
    "norm.language.bias": "beit3.encoder.layer_norm.B.bias",
    "image_head.weight": "mim_head.weight",
    "image_head.bias": "mim_head.bias",
    "text_head.weight": "mlm_head.weight",
    "text_head.bias": "mlm_head.bias",
}
_IN_BLOCK_BACK = {released: ours for ours, released in _IN_BLOCK.items()}
_OUTSIDE_BACK = {released: ours for ours, released in _OUTSIDE.items()}
_TASK_MODULES = ("pooler", "head", "fc_norm", "language_head", "vision_head", "logit_scale")
_TEMPERATURE = f"{TASK_HEAD}logit_scale"  # a number there, one element here
_CONTRAST = f"{OBJECTIVE_HEADS}contrastive."
_MARKS = {  # task -> one of the modules that only it has
    "vqa": f"{TASK_HEAD}pooler.dense.weight",
    "retrieval": f"{TASK_HEAD}language_head.weight",
    "nlvr2": f"{TASK_HEAD}head.dense1.weight",
    "imagenet": f"{TASK_HEAD}fc_norm.weight",
}
_CLASSES = (f"{TASK_HEAD}head.weight", f"{TASK_HEAD}head.3.weight")  # last matrix of imagenet, of vqa

log = logging.getLogger(__name__)


def released_name(name: str) -> str:
    """The released key of a parameter. Raises ValueError where the form has no place for it."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if name.startswith(TASK_HEAD):
        return name.removeprefix(TASK_HEAD)
    if (block := re.fullmatch(r"blocks\.(\d+)\.(.+)", name)) and block[2] in _IN_BLOCK:
        return f"beit3.encoder.layers.{block[1]}.{_IN_BLOCK[block[2]]}"
    raise ValueError(f"{name} has no place in the released form: it holds per-modality attention and no VL expert")


def canonical_name(key: str) -> str:
    """Our name of a released key: the reverse of `released_name`."""
    if key in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[key]
    if key.split(".")[0] in _TASK_MODULES:
        return TASK_HEAD + key
    if (layer := re.fullmatch(r"beit3\.encoder\.layers\.(\d+)\.(.+)", key)) and layer[2] in _IN_BLOCK_BACK:
        return f"blocks.{layer[1]}.{_IN_BLOCK_BACK[layer[2]]}"
    raise ValueError(f"{key} is no key of a released BEiT-3 checkpoint")


def as_convolution(weight: Tensor) -> Tensor:
    """The patches' projection [D, 3 p p] as a convolution's kernel [D, 3, p, p]."""
    patch_size = isqrt(weight.shape[1] // 3)
    return weight.reshape(len(weight), 3, patch_size, patch_size)


def _in_released_shape(name: str, value: Tensor) -> Tensor:
    if name == "vision_embedding.projection.weight":
        return as_convolution(value)
    if name in ("vision_embedding.cls_token", "vision_embedding.mask_token"):
        return value.reshape(1, 1, -1)
    return value.reshape(()) if name == _TEMPERATURE else value


def _in_canonical_shape(name: str, value: Tensor) -> Tensor:
    if name == "vision_embedding.projection.weight":
        return value.flatten(1)
    if name in ("vision_embedding.cls_token", "vision_embedding.mask_token"):
        return value.flatten()
    return value.reshape(1) if name == _TEMPERATURE else value


def weights_to_released(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the released keys and shapes. What both modalities share is written twice, which computes the
    same.

    Raises ValueError for a model with VL experts.
    """
    if any(".vl." in name for name in weights):
        raise ValueError(
            "a model with VL experts (model.vl_expert_layers > 0) does not fit: the released form has one expert "
            "for vision and one for language; --to safetensors and --to neutral hold all of it"
        )
    if any(".shared." in name for name in weights):
        log.warning("what vision and language share is written twice, once for each: the form has no other")
    if not any(".inner_norm." in name for name in weights):
        log.warning("the model has no sub-LayerNorm: build torchscale's with EncoderConfig(subln=False, ...)")
    own = {name: name.replace(_CONTRAST, TASK_HEAD, 1) for name in weights if name.startswith(_CONTRAST)}
    if f"{_CONTRAST}logit_bias" not in own and all(len({*weights[name].shape}) == 1 for name in own):
        weights = {own.get(name, name): value for name, value in weights.items()}  # the head of released retrieval
    if left_out := sorted({name.split(".")[1] for name in weights if name.startswith(OBJECTIVE_HEADS)}):
        log.warning("the released form has no place for the heads of %s", ", ".join(left_out))
    released = {}
    for name, value in weights.items():
        if name.startswith(OBJECTIVE_HEADS):
            continue
        sides = [name.replace(".shared.", f".{side}.") for side in _SIDES] if ".shared." in name else [name]
        for side in sides:
            released[released_name(side)] = _in_released_shape(name, value).contiguous()
    return released


def weights_to_torchscale(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of torchscale's BEiT3, which is the released model without its heads."""
    released = weights_to_released(weights)
    left_out = sorted(key for key in released if not key.startswith(PREFIX))
    if left_out:
        log.warning("torchscale's BEiT3 has no heads; left out: %s", ", ".join(left_out))
    return {key.removeprefix(PREFIX): value for key, value in released.items() if key.startswith(PREFIX)}


def weights_from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names and shapes. Raises ValueError for a key that is not known."""
    names = {key: canonical_name(key) for key in state}
    return {name: _in_canonical_shape(name, state[key]) for key, name in names.items()}


def task_of(weights: Mapping[str, Tensor], name: str | None = None) -> dict[str, Any] | None:
    """What a fine-tuned model (under our names) is for: its task, which its heads tell where it is not given, and the
    number of its classes. None: it has no head of a task."""
    if name is None:
        marks = {mark: task for task, mark in _MARKS.items() if mark in weights}
        captions = "text_head.weight" in weights and "image_head.weight" not in weights
        name = next(iter(marks.values()), "captioning" if captions else None)
    if name is None:
        return None
    last = next((key for key in _CLASSES if key in weights), None)
    return {"name": name, "classes": len(weights[last])} if last else {"name": name}
