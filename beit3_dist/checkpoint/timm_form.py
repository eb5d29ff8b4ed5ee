"""The vision branch as a VisionTransformer of timm: its `beit3_*` models, and its `vit_*` ones as a start.

For an image alone only the vision experts run, so the vision side of any of our models fits, with VL experts too.
timm builds a model with the classifier of ImageNet (`fc_norm` on the mean of the patches, then `head`) by default, and
with the final norm that pretraining has by `num_classes=0, global_pool=""`: its output then is our `encode(images)`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from beit3_dist.checkpoint.files import folder_made_aside, write_json
from beit3_dist.checkpoint.model_folder import CONFIG, TASK_HEAD, WEIGHTS, save_safetensors
from beit3_dist.checkpoint.released import as_convolution
from beit3_dist.config import ModelConfig, require
from beit3_dist.model.embedding import FIRST_POSITION

_MODELS = {  # width, layers, patch size -> the name in timm
    (768, 12, 16): "beit3_base_patch16_224",
    (1024, 24, 16): "beit3_large_patch16_224",
    (1408, 40, 14): "beit3_giant_patch14_224",
}
EPS = 1e-5
"""Epsilon of the LayerNorms of timm's beit3_* models."""
_IN_BLOCK = {  # ours -> timm's, below `blocks.{i}.`; q, k and v are one there
    "attention_norm.vision": "norm1",
    "attention.inner_norm.vision": "attn.norm",
    "attention.out.vision": "attn.proj",
    "ffn.vision.norm": "norm2",
    "ffn.vision.fc1": "mlp.fc1",
    "ffn.vision.inner_norm": "mlp.norm",
    "ffn.vision.fc2": "mlp.fc2",
}
_OUTSIDE = {
    "vision_embedding.projection.weight": "patch_embed.proj.weight",
    "vision_embedding.projection.bias": "patch_embed.proj.bias",
    "vision_embedding.cls_token": "cls_token",
    "vision_embedding.positions": "pos_embed",
    "norm.vision.weight": "norm.weight",
    "norm.vision.bias": "norm.bias",
    f"{TASK_HEAD}fc_norm.weight": "fc_norm.weight",
    f"{TASK_HEAD}fc_norm.bias": "fc_norm.bias",
    f"{TASK_HEAD}head.weight": "head.weight",
    f"{TASK_HEAD}head.bias": "head.bias",
}
_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}

log = logging.getLogger(__name__)


def _their_name(name: str) -> str | None:
    """timm's key; None for what it has no place for, and for q, k and v, which are joined."""
    if block := re.fullmatch(r"(blocks\.\d+)\.(.+)\.(weight|bias)", name):
        return f"{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}" if block[2] in _IN_BLOCK else None
    return _OUTSIDE.get(name)


def weights_to_timm(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The vision side of our weights in timm's keys and shapes."""
    require(
        config.vision_layers == 0,
        "the image encoder of model.vision_layers has no final norm, which timm's models have",
    )
    vision = {name.replace(".shared.", ".vision."): value for name, value in weights.items()}
    classifies = f"{TASK_HEAD}fc_norm.weight" in vision
    if not classifies:  # a head of another task
        vision = {name: value for name, value in vision.items() if not name.startswith(TASK_HEAD)}
    timm = {key: value for name, value in vision.items() if (key := _their_name(name)) is not None}
    if classifies:
        timm = {key: value for key, value in timm.items() if not key.startswith("norm.")}
    timm["patch_embed.proj.weight"] = as_convolution(timm["patch_embed.proj.weight"])
    timm["cls_token"] = timm["cls_token"].reshape(1, 1, -1)
    timm["pos_embed"] = timm["pos_embed"][FIRST_POSITION:].unsqueeze(0)
    for layer in range(config.lower_layers):
        for leaf in ("weight", "bias"):
            parts = [vision[f"blocks.{layer}.attention.{part}.vision.{leaf}"] for part in "qkv"]
            timm[f"blocks.{layer}.attn.qkv.{leaf}"] = torch.cat(parts)
    log.warning("only the vision side is written")
    return {key: value.contiguous() for key, value in timm.items()}


def how_to_load(config: ModelConfig, timm: Mapping[str, Tensor]) -> str:
    """The call in Python that builds timm's model for these weights."""
    name = _MODELS.get((config.width, config.layers, config.patch_size))
    if name is None:
        return "timm has no beit3_* model of this size: give timm.models.VisionTransformer its geometry"
    head = f"num_classes={len(timm['head.weight'])}" if "head.weight" in timm else 'num_classes=0, global_pool=""'
    size = "" if config.image_size == 224 else f", img_size={config.image_size}"
    norms = "" if config.sub_layernorm else ", scale_attn_norm=False, scale_mlp_norm=False"
    return f'load it with timm.create_model("{name}", {head}{size}{norms}, checkpoint_path=...)'


def _without_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without layer scale, and with one bias for queries, keys and values: a key's is always 0."""
    plain = dict(state)
    for key in state:
        scale = re.fullmatch(r"(blocks\.\d+)\.(?:ls|gamma_)([12])(?:\.gamma)?", key)
        if scale:
            factor, layer = plain.pop(key), f"{scale[1]}.{'attn.proj' if scale[2] == '1' else 'mlp.fc2'}"
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] * factor[:, None]
            plain[f"{layer}.bias"] = plain[f"{layer}.bias"] * factor
        elif key.endswith(".attn.q_bias"):
            of_queries, of_values = plain.pop(key), plain.pop(key.replace("q_bias", "v_bias"))
            bias = torch.cat([of_queries, torch.zeros_like(of_queries), of_values])
            plain[key.replace("q_bias", "qkv.bias")] = bias
    return {key: value for key, value in plain.items() if not key.endswith(".attn.k_bias")}


def save_timm_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    statistics: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Writes a new folder, whole or not at all, that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: a
    beit3_* model with our geometry. `statistics`: mean and deviation that images are normalised by.

    Raises ValueError where the folder exists, or for another epsilon than that of timm's models.
    """
    require(config.layer_norm_eps == EPS, f"model.layer_norm_eps={config.layer_norm_eps}: timm's beit3_* have {EPS}")
    timm = weights_to_timm(weights, config)
    classes = len(timm["head.weight"]) if "head.weight" in timm else 0
    pooling = "avg" if classes else ""
    content = {
        "architecture": _MODELS.get((config.width, config.layers, config.patch_size), min(_MODELS.values())),
        "num_classes": classes,
        "num_features": config.width,
        "global_pool": pooling,
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.lower_layers,
            "num_heads": config.heads,
            "mlp_ratio": (config.ffn_width + 0.5) / config.width,  # timm rounds the product down
            "scale_attn_norm": config.sub_layernorm,
            "scale_mlp_norm": config.sub_layernorm,
            "global_pool": pooling,
        },
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": True,
            "num_classes": classes,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(statistics[0]),
            "std": list(statistics[1]),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    log.info('load it with timm.create_model("local-dir:%s", pretrained=True)', folder)
    with folder_made_aside(folder) as partial:
        save_safetensors(partial / WEIGHTS, timm)
        write_json(partial / CONFIG, content)


def weights_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names; there is no language side and no mask token. A classifier that stands on CLS, as that of
    the vit_* models, is left out; factors of layer scale become those of what they multiply, and a BEiT's biases of
    queries and values those of all three. Raises ValueError for an unknown key, and where positions are relative."""
    if relative := next((key for key in state if "relative_position" in key), None):
        raise ValueError(f"{relative}: its positions are relative, and the model's are not")
    require("pos_embed" in state, "it has no pos_embed: it is not the whole of such a model")
    state = _without_scales(state)
    if "head.weight" in state and "fc_norm.weight" not in state:
        log.warning("its classifier stands on CLS, where no task of ours has one: it is left out")
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    weights = {}
    for key, value in state.items():
        block = re.fullmatch(r"(blocks\.\d+)\.(.+)\.(weight|bias)", key)
        if key in _OUTSIDE_BACK:
            weights[_OUTSIDE_BACK[key]] = value
        elif block and block[2] in _IN_BLOCK_BACK:
            weights[f"{block[1]}.{_IN_BLOCK_BACK[block[2]]}.{block[3]}"] = value
        elif block and block[2] == "attn.qkv":
            for part, values in zip("qkv", value.chunk(3), strict=True):
                weights[f"{block[1]}.attention.{part}.vision.{block[3]}"] = values.clone()
        else:
            raise ValueError(f"{key} is no key of timm's beit3_* models")
    unused = state["pos_embed"].new_zeros(FIRST_POSITION, state["pos_embed"].shape[-1])
    weights["vision_embedding.positions"] = torch.cat([unused, state["pos_embed"][0]])
    weights["vision_embedding.cls_token"] = state["cls_token"].flatten()
    weights["vision_embedding.projection.weight"] = state["patch_embed.proj.weight"].flatten(1)
    return weights
