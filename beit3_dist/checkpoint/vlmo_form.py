"""VLMo's released form (unilm/vlmo): attention in common, experts of images, of words and, on top, of both.

What it adds has a place here without changing what is computed: factors of layer scale become those of what they
multiply, a segment's vector is part of the positions, that of a modality part of the image's positions and of the norm
of words. A key's bias, which it has not, changes no softmax. Biases of relative positions, which its base and large
models have in place of positions, and the matrix before its head for words have no place.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from beit3_dist.checkpoint.model_folder import OBJECTIVE_HEADS
from beit3_dist.checkpoint.released import as_convolution
from beit3_dist.config import ModelConfig, require
from beit3_dist.model.embedding import FIRST_POSITION

_SIDES = {"vision": "imag", "language": "text", "vl": "vl"}
_IN_BLOCK = {"attention_norm.shared": "norm1", "attention.out.shared": "attn.proj"} | {
    f"ffn.{ours}.{part}": f"norm2_{theirs}" if part == "norm" else f"mlp_{theirs}.{part}"
    for ours, theirs in _SIDES.items()
    for part in ("norm", "fc1", "fc2")
}
_MODULES = {  # with a weight and a bias
    "vision_embedding.projection": "transformer.patch_embed.proj",
    "norm.shared": "transformer.norm",
    "language_embedding.norm": "text_embeddings.LayerNorm",
    f"{OBJECTIVE_HEADS}matching.pooler": "pooler.dense",
    f"{OBJECTIVE_HEADS}matching.score": "itm_score.fc",
}
_OUTSIDE = {
    f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in _MODULES.items() for leaf in ("weight", "bias")
} | {
    "vision_embedding.cls_token": "transformer.cls_token",
    "vision_embedding.positions": "transformer.pos_embed",
    "language_embedding.words.weight": "text_embeddings.word_embeddings.weight",
    "language_embedding.positions": "text_embeddings.position_embeddings.weight",
    f"{OBJECTIVE_HEADS}contrastive.vision_head.weight": "itc_image_proj.fc.weight",
    f"{OBJECTIVE_HEADS}contrastive.language_head.weight": "itc_text_proj.fc.weight",
    f"{OBJECTIVE_HEADS}contrastive.logit_scale": "logit_scale",
}
_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_RELATIVE = "relative_position_bias_table"
_SEGMENTS, _MODALITIES = "text_embeddings.token_type_embeddings.weight", "token_type_embeddings.weight"
_WITHOUT_PLACE = re.compile(
    r"relative_position_|text_(imag_)?relative_|text_embeddings\.position_ids|itc_vl_|logit_vl_scale|mlm_score\.|"
    r"vqa_classifier\.|nlvr2_classifier\."
)
_TEXTS_OF_TABLE = 196
"""Longest text that its table of relative positions was made for (config: max_text_len_of_initckpt)."""

log = logging.getLogger(__name__)


def is_vlmo(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has VLMo's keys."""
    return {"transformer.blocks.0.norm2_imag.weight", "transformer.blocks.0.attn.qkv.weight"} <= state.keys()


def weights_from_vlmo(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names and shapes. What has no place is left out, which is logged. Raises ValueError for an
    unknown key, and where some of a block is missing."""
    state, weights = _with_positions(state), {}
    left_out = sorted({key.split(".")[0] for key in state if _WITHOUT_PLACE.match(key)})
    if left_out:
        log.warning("there is no place for %s of VLMo", ", ".join(left_out))
    for key, value in state.items():
        block = re.fullmatch(r"transformer\.(blocks\.\d+)\.(.+)\.(weight|bias)", key)
        if key in _OUTSIDE_BACK:
            weights[_OUTSIDE_BACK[key]] = value
        elif block and block[2] in _IN_BLOCK_BACK:
            factor = state.get(f"transformer.{block[1]}.gamma_{_branch(block[2])}")
            scaled = value if factor is None else value * (factor[:, None] if block[3] == "weight" else factor)
            weights[f"{block[1]}.{_IN_BLOCK_BACK[block[2]]}.{block[3]}"] = scaled
        elif block and block[2] == "attn.qkv":
            prefix = f"transformer.{block[1]}.attn"
            biases = state[f"{prefix}.q_bias"], torch.zeros_like(state[f"{prefix}.q_bias"]), state[f"{prefix}.v_bias"]
            for part, values, bias in zip("qkv", value.chunk(3), biases, strict=True):
                weights[f"{block[1]}.attention.{part}.shared.weight"] = values.clone()
                weights[f"{block[1]}.attention.{part}.shared.bias"] = bias
        elif not re.search(r"\.(gamma_[12]|attn\.[qv]_bias)$|token_type_embeddings\.weight$", key):
            require(bool(_WITHOUT_PLACE.match(key)), f"{key} is no key of VLMo")
    of_words, of_images = state[_MODALITIES][:2] if _MODALITIES in state else (0, 0)
    for name in ("vision_embedding.positions", "language_embedding.positions"):
        table = weights[name] + (of_images if name.startswith("vision") else state[_SEGMENTS][0])
        weights[name] = torch.cat([table.new_zeros(FIRST_POSITION, table.shape[1]), table])
    weights["language_embedding.norm.bias"] = weights["language_embedding.norm.bias"] + of_words
    weights["vision_embedding.cls_token"] = weights["vision_embedding.cls_token"].flatten()
    weights["vision_embedding.projection.weight"] = weights["vision_embedding.projection.weight"].flatten(1)
    if (scale := f"{OBJECTIVE_HEADS}contrastive.logit_scale") in weights:
        weights[scale] = weights[scale].reshape(1)
    return weights


def _branch(module: str) -> str:
    """Which factor of layer scale multiplies a module's output: 1, 2, or none."""
    return "1" if module == "attn.proj" else "2" if module.endswith(".fc2") else "none"


def _with_positions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with positions [N, D] of patches and of words; zeros where they are relative."""
    plain, words = dict(state), "text_embeddings.position_embeddings.weight"
    if _RELATIVE in state:
        log.warning("its relative positions are left out: those of the model begin at 0, and are learnt anew")
        grid = (isqrt(len(state[_RELATIVE]) - 2 * _TEXTS_OF_TABLE - 5) + 1) // 2
        patch = state["transformer.patch_embed.proj.weight"]
        plain["transformer.pos_embed"] = patch.new_zeros(1 + grid * grid, len(patch))
        plain[words] = torch.zeros_like(state[words])
    else:
        plain["transformer.pos_embed"] = state["transformer.pos_embed"][0]
    return plain


def weights_to_vlmo(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our weights in the keys and shapes of VLMo's base plus, which has positions and no layer scale. Raises ValueError
    for a model of another architecture."""
    require(
        config.attention == "shared" and config.ffn == "per_modality" and config.word_norm and not config.sub_layernorm,
        "VLMo's form is of a model with model.attention=shared, model.ffn=per_modality, model.word_norm=true and "
        "model.sub_layernorm=false",
    )
    vlmo, left_out = {}, []
    for name, value in weights.items():
        block = re.fullmatch(r"(blocks\.\d+)\.(.+)\.(weight|bias)", name)
        if name in _OUTSIDE:
            vlmo[_OUTSIDE[name]] = value
        elif block and block[2] in _IN_BLOCK:
            vlmo[f"transformer.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"] = value
        elif block and block[2] == "attention.q.shared":
            q, k, v = (weights[f"{block[1]}.attention.{part}.shared.{block[3]}"] for part in "qkv")
            prefix = f"transformer.{block[1]}.attn"
            vlmo |= {f"{prefix}.qkv.weight": torch.cat([q, k, v])} if block[3] == "weight" else {
                f"{prefix}.q_bias": q, f"{prefix}.v_bias": v}  # fmt: skip
        elif not block:
            left_out.append(name)
    log.warning("VLMo's form has no place for %s", ", ".join(sorted(left_out)) or "nothing of it")
    none = vlmo["text_embeddings.word_embeddings.weight"].new_zeros(2, config.width)
    vlmo |= {_SEGMENTS: none, _MODALITIES: none.clone()}
    vlmo["transformer.pos_embed"] = vlmo["transformer.pos_embed"][None, FIRST_POSITION:]
    words = "text_embeddings.position_embeddings.weight"
    vlmo[words] = vlmo[words][FIRST_POSITION:]
    vlmo["transformer.cls_token"] = vlmo["transformer.cls_token"].reshape(1, 1, -1)
    vlmo["transformer.patch_embed.proj.weight"] = as_convolution(vlmo["transformer.patch_embed.proj.weight"])
    if "logit_scale" in vlmo:
        vlmo["logit_scale"] = vlmo["logit_scale"].reshape(())
    return {key: value.contiguous() for key, value in vlmo.items()}
