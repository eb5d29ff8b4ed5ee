"""Weights and models that belong together: the geometry of given weights, and given weights in a given model.

A file may lack a whole group of weights: an encoder has no heads, a model of VQA no final norm, timm's no language.
Half a group is a damaged file, or another model's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isqrt

import torch
from torch import Tensor

from beit3_dist.checkpoint.model_folder import OBJECTIVE_HEADS, TASK_HEAD, block_count, check_blocks
from beit3_dist.checkpoint.positions import FIRST_PATCH, interpolate_patch, interpolate_positions
from beit3_dist.checkpoint.released import released_name
from beit3_dist.config import ModelConfig
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.opening import blaming

POSITIONS = "vision_embedding.positions"
PATCH = "vision_embedding.projection.weight"
_TOWER = "vision_embedding.blocks"

_OWN_HEADS = {
    "the image head": r"image_head\..*",
    "the text head": r"text_head\..*",
    "the task's head": r"task_head\.(?!match\.).*",
    "the task's head of matching": r"task_head\.match\..*",
}
_NORM = {"the final norm": r"norm\..*", "the decoder": r"decoder\..*"}
_HEADS = {**_OWN_HEADS, "heads of objectives": rf"{re.escape(OBJECTIVE_HEADS)}.*"}
_USE_OF_TASK = {**_HEADS, **_NORM}
_GROUPS = {
    **_OWN_HEADS,
    **_NORM,
    "the mask token": r"vision_embedding\.mask_token",
    "the language side": r"language_embedding\..*|(.*\.)?language\..*",
    "the vision-language experts": r"blocks\.\d+\.ffn\.vl\..*",
}
_BY_CLASS = {
    "which class a box is of": r"task_head\.boxes\.\d+\.score\..*",
    "where a box is": r"task_head\.boxes\.\d+\.offset\..*",
    "the mask of each class": r"task_head\.masks\.draw\..*",
}
"""Parts of a detector that are of its classes: those of other ones begin anew, and the rest goes on (Objects365, then
COCO)."""
_RELEASED_HEADS = {
    768: 12,
    1024: 16,
    1408: 16,
    544: 16,
}  # width -> attention heads: base, large, giant, VLMo's base plus

log = logging.getLogger(__name__)


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Canonical name -> shape of the pretraining model's parameters."""
    return {name: parameter.shape for name, parameter in BEiT3(config, device="meta").named_parameters()}


def infer_config(
    weights: Mapping[str, Tensor], attention_heads: int | None, layer_norm_eps: float | None = None
) -> ModelConfig:
    """The geometry of weights with experts. What a file of weights does not tell has the released models' values;
    `layer_norm_eps`: of one that is not of their architecture.

    Raises ValueError where the number of attention heads is not known from the width.
    """
    for name in ("vision_embedding.projection.weight", POSITIONS, "blocks.0.ffn.vision.fc1.weight"):
        if name not in weights:
            raise ValueError(f"it has no {_in_both_forms(name)}: it is not the whole of a BEiT-3 model")
    width, pixels = weights["vision_embedding.projection.weight"].shape
    if attention_heads is None and width not in _RELEASED_HEADS:
        raise ValueError(f"no released model has width {width}: give --attention_heads, which weights do not tell")
    patch_size = isqrt(pixels // 3)
    grid = isqrt(len(weights[POSITIONS]) - FIRST_PATCH)
    plain = ModelConfig()

    def rows(name: str, otherwise: int) -> int:
        return len(weights[name]) if name in weights else otherwise

    released = "blocks.0.attention.inner_norm.vision.weight" in weights
    return ModelConfig(
        layers=block_count(weights),
        width=width,
        heads=attention_heads or _RELEASED_HEADS[width],
        ffn_width=len(weights["blocks.0.ffn.vision.fc1.weight"]),
        patch_size=patch_size,
        image_size=grid * patch_size,
        attention="shared" if "blocks.0.attention.q.shared.weight" in weights else "per_modality",
        sub_layernorm=released,
        word_norm="language_embedding.norm.weight" in weights,
        layer_norm_eps=plain.layer_norm_eps if released or layer_norm_eps is None else layer_norm_eps,
        vl_expert_layers=sum(name.endswith(".ffn.vl.fc1.weight") for name in weights),
        vocab_size=rows("language_embedding.words.weight", plain.vocab_size),
        visual_vocab_size=rows("image_head.weight", plain.visual_vocab_size),
        max_text_length=rows("language_embedding.positions", plain.max_text_length + 2) - 2,
    )


def _in_both_forms(name: str) -> str:
    """A parameter's released key, where it has one, and its name."""
    try:
        return f"{released_name(name)} ({name} here)"
    except ValueError:
        return name


def absent_groups(names: Iterable[str], needed: Iterable[str], besides: Mapping[str, str] | None = None) -> list[str]:
    """The groups of `needed` weights of which `names` has none. Raises ValueError where a weight of a group that is
    there, or of none of the groups, is missing. `besides`: further groups."""
    needed = set(needed)
    missing = needed - set(names)
    absent, excused = [], set()
    objectives = {name.split(".")[1] for name in needed if name.startswith(OBJECTIVE_HEADS)}
    heads = {f"the head of {name}": rf"{re.escape(OBJECTIVE_HEADS + name)}\..*" for name in sorted(objectives)}
    for group, pattern in {**_GROUPS, **heads, **(besides or {})}.items():
        members = {name for name in needed if re.fullmatch(pattern, name)}
        if members and members <= missing:
            absent.append(group)
            excused |= members
    if wrong := sorted(missing - excused):
        raise ValueError(f"it has no {_in_both_forms(wrong[0])}: it is not the whole of such a model")
    return absent


def check_shapes(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raises ValueError for the first weight of another shape, and for one that is no number with a fraction."""
    for name, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(f"{_in_both_forms(name)} is of type {value.dtype}, weights are floating-point numbers")
        if name in shapes and value.shape != shapes[name]:
            remedy = "; tools/convert_checkpoint.py --heads drop leaves heads out" if _in_any(_HEADS, name) else ""
            raise ValueError(
                f"{_in_both_forms(name)} has shape {list(value.shape)}, the model needs {list(shapes[name])}{remedy}"
            )


def _in_any(groups: Mapping[str, str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in groups.values())


def check_whole(weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raises ValueError where weights are not `config`'s model, but for groups that may be absent."""
    check_blocks(weights, config)
    shapes = shapes_of(config)
    absent_groups(weights, shapes)
    for name in weights:
        if name not in shapes and not name.startswith((TASK_HEAD, OBJECTIVE_HEADS)):
            raise ValueError(f"{_in_both_forms(name)} is no weight of a model with {_architecture(config)}")
    check_shapes(weights, shapes)


def _architecture(config: ModelConfig) -> str:
    fields = ("layers", "attention", "ffn", "sub_layernorm", "vl_expert_layers")
    return ", ".join(f"model.{field}={getattr(config, field)}" for field in fields)


def at_image_size(
    weights: Mapping[str, Tensor], config: ModelConfig, image_size: int
) -> tuple[dict[str, Tensor], ModelConfig]:
    """The weights and the config for images of another size. Raises ValueError where the patches do not fit it."""
    config = replace(config, image_size=image_size)
    grid = image_size // config.patch_size
    return {**weights, POSITIONS: interpolate_positions(weights[POSITIONS], grid)}, config


def without_heads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder alone."""
    return {name: value for name, value in weights.items() if not _in_any(_HEADS, name)}


def fit(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    source: str,
    besides: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Those of the parameters in `shapes` that the weights give, float32. `config`: of the model that is to be filled.

    Positions and the patches' projection are interpolated to its resolution; heads and a final norm that it does not
    have are left out; groups that the weights lack are absent from the result. A log message says so of each. Raises
    ValueError where the weights are another model's. `besides`: further groups that may be absent.
    """
    with blaming(source):
        return _fit(weights, config, shapes, source, besides or {})


def _head_of(name: str) -> str:
    """What the name of a head's parameter begins with: `task_head.` or `objective_heads.NAME.`; else nothing."""
    found = re.match(rf"{re.escape(TASK_HEAD)}|{re.escape(OBJECTIVE_HEADS)}[^.]+\.", name)
    return found[0] if found else ""


def _as_shared(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str) -> Mapping[str, Tensor]:
    """The weights where those of vision alone are a start of what both share in the model (VLMo and ViLT begin
    with a vision Transformer)."""
    if any(re.fullmatch(_GROUPS["the language side"], name) for name in weights):
        return weights
    shared = {name: name.replace(".vision.", ".shared.") for name in weights}
    if taken := {name for name, other in shared.items() if name not in shapes and other in shapes}:
        log.warning("%s has weights of vision alone: what vision and language share starts from them", source)
    return {shared[name] if name in taken else name: value for name, value in weights.items()}


def _in_other_places(
    weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str
) -> Mapping[str, Tensor]:
    """The weights where a head that is needed is another one there: a task's head and an objective's serve as one
    another where all that is needed is there under the same names, in the same shapes."""
    for needed in sorted({_head_of(name) for name in shapes} - {_head_of(name) for name in weights}):
        wanted = {name.removeprefix(needed): shape for name, shape in shapes.items() if _head_of(name) == needed}
        for there in sorted({_head_of(name) for name in weights} - {""}):
            if all(there + name in weights and weights[there + name].shape == s for name, s in wanted.items()):
                log.warning("%s: %s* serves as %s*", source, there, needed)
                weights = {**weights, **{needed + name: weights[there + name] for name in wanted}}
                break
    return weights


def _in_tower(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], source: str) -> Mapping[str, Tensor]:
    """The weights where those of vision alone are a start of an image encoder of its own width, which has no final
    norm."""
    if any(re.fullmatch(_GROUPS["the language side"], name) for name in weights):
        return weights
    tower = {name: f"{_TOWER}{name.removeprefix('blocks')}" for name in weights if name.startswith("blocks.")}
    if not any(name in shapes for name in tower.values()):
        return weights
    log.warning("%s: the final norm is not used", source)
    return {tower.get(name, name): value for name, value in weights.items() if not name.startswith("norm.")}


def _fit(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    source: str,
    besides: Mapping[str, str],
) -> dict[str, Tensor]:
    rows = len(weights[POSITIONS]) if POSITIONS in weights else 0
    if POSITIONS in shapes and rows > FIRST_PATCH and rows != shapes[POSITIONS][0]:
        weights, _ = at_image_size(weights, config, config.image_size)
        log.warning(
            "%s: %d vision positions are interpolated to %d for model.image_size=%d",
            source, rows, shapes[POSITIONS][0], config.image_size,
        )  # fmt: skip
    sides = [isqrt(shape[1] // 3) for shape in (weights[PATCH].shape, shapes[PATCH])] if PATCH in weights else [0, 0]
    if sides[0] != sides[1]:
        weights = {**weights, PATCH: interpolate_patch(weights[PATCH], sides[1])}
        log.warning("%s: patches of %d pixels are interpolated to model.patch_size=%d", source, *sides)
    others = {n for n, v in weights.items() if n in shapes and v.shape != shapes[n] and _in_any(_BY_CLASS, n)}
    weights = _in_tower({name: value for name, value in weights.items() if name not in others}, shapes, source)
    weights = _in_other_places(_as_shared(weights, shapes, source), shapes, source)
    unused = [name for name in weights if name not in shapes]
    for name in unused:
        if not _in_any(_USE_OF_TASK, name):
            raise ValueError(f"{_in_both_forms(name)} is no weight of a model with {_architecture(config)}")
    for group, pattern in _USE_OF_TASK.items():
        if any(re.fullmatch(pattern, name) for name in unused):
            log.warning("%s: %s is not used", source, group)
    used = {name: value for name, value in weights.items() if name in shapes}
    fusion = "|".join(map(str, range(config.lower_layers, config.layers)))
    above = {"the fusion layers": rf"blocks\.({fusion})\..*"} if fusion else {}  # two encoders are a start
    above |= {"the bridge": r"vision_embedding\.bridge.*"} if config.vision_layers else {}
    above |= {**_BY_CLASS, "masks": r"task_head\.masks\..*"}
    for group in absent_groups(used, shapes, {**above, **besides}):
        log.warning("%s has no weights for %s: initial values are taken", source, group)
    check_shapes(used, shapes)
    return {name: value.float() for name, value in used.items()}
