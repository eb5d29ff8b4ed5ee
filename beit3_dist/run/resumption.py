"""A resumed run whose recipe has changed: what of it is refused, what needs consent, and what is said.

Every field of every config is in one of the classes below. What is compared is the recipe in the checkpoint that the
run goes on from; a field that a former version did not have is not compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from beit3_dist.command_line import to_yaml
from beit3_dist.config import JobConfig
from beit3_dist.looking import of_run
from beit3_dist.objectives import SECTIONS
from beit3_dist.opening import read_yaml
from beit3_dist.recipe import current_name

log = logging.getLogger(__name__)


class OnResume(Enum):
    """What happens where a resumed run has another value of a field."""

    FIXED = "it is refused: the checkpoint is of another network or optimizer"
    RECIPE = "it needs checkpoint.other_recipe: a step has other samples, or the moments are those of another loss"
    COMPARED = "its content is compared, wherever it lies (sources.py), under checkpoint.other_data; else it is said"
    SAID = "it is said"
    FREE = "nothing: no step depends on it"


_FIELDS = {
    OnResume.FIXED: """
        task batch train_only optim.name
        gradient_masking.every gradient_masking.share gradient_masking.share_per_update
        model.layers model.width model.heads model.ffn_width model.patch_size model.image_size model.attention model.ffn
        model.sub_layernorm model.word_norm model.post_norm model.vl_expert_layers model.fusion_layers
        model.connected_every model.language_layers model.vision_layers model.vision_width model.vision_heads
        model.vocab_size model.visual_vocab_size model.max_text_length
        model.drop_path model.layer_norm_eps
        model.codebook_size model.code_dim model.decoder_layers model.codebook_decay
        dense.window dense.global_blocks dense.channels dense.cascade
        dense.pyramid dense.head dense.queries""",
    OnResume.RECIPE: """
        batch.images batch.texts batch.pairs batch.size
        data.caption_key data.max_pixels
        optim.beta1 optim.beta2 optim.momentum
        label_smoothing name_smoothing mixup cutmix caption_mask_ratio drop_worst_ratio drop_worst_after ema_decay
        teacher.kind teacher.name teacher.quick_gelu teacher.head_dim""",
    OnResume.COMPARED: """
        seed text_tokenizer image_tokenizer teacher.weights
        data.images data.texts data.pairs data.train data.answers data.text_length
        data.temperature.images data.temperature.texts data.temperature.pairs
        data.shuffle data.shuffle_block data.shuffle_window data.virtual_readers""",
    OnResume.SAID: """
        steps epochs warmup_epochs precision kernels attention_kernel cuda_graphs deterministic activation_checkpointing
        activation_checkpointing_every deepspeed_config image_codes layer_decay head_lr_scale pictures_every
        batch.accumulation
        parallel.tensor parallel.pipeline parallel.chunks parallel.sequence parallel.zero_stage
        optim.lr optim.min_lr optim.decay optim.decay_share optim.warmup_steps optim.eps
        optim.weight_decay optim.clip_norm
        data.caption_length data.min_crop_scale data.scaled_decoding data.color_jitter data.horizontal_flip
        data.rand_augment data.random_erasing data.max_bad_fraction data.validation
        eval.every eval.batches eval.images eval.texts eval.pairs eval.image_codes eval.retrieval eval.captions
        eval.classes eval.classes_train eval.pictures eval.class_names eval.templates eval.at_most
        eval.beams eval.length_penalty eval.caption_metrics eval.batch eval.rerank
        checkpoint.every checkpoint.keep checkpoint.keep_every
        dense.proposals dense.regions data.scales eval.detections eval.least_score eval.soft_nms eval.maskness
        eval.stride eval.flip eval.scales data.photometric
        guards.max_skipped_steps guards.spike_window guards.spike_factor guards.step_timeout_s guards.compare_every
        guards.times_every""",
    OnResume.FREE: """
        out init_from plugins profile trackers evaluate_only data.workers data.prefetch data.cache
        callbacks.on_step callbacks.on_validation callbacks.on_save
        checkpoint.resume checkpoint.other_data checkpoint.other_resolution checkpoint.other_recipe""",
}
ON_RESUME = {name: on_resume for on_resume, names in _FIELDS.items() for name in names.split()}
"""Dotted name of a field -> its class."""


def on_resume(name: str) -> OnResume:
    """The class of a field. Those of objectives, which plugins may bring, are all of one, but for their teachers."""
    if not name.startswith("objectives."):
        return ON_RESUME[name]
    _, is_teachers, of_teacher = name.partition(".teacher.")
    return ON_RESUME[f"teacher.{of_teacher}"] if is_teachers else OnResume.RECIPE


def objectives_in(fields: Iterable[str]) -> set[str]:
    """The objectives that a recipe with these dotted fields has, the default one where it names none."""
    return {name.split(".")[1] for name in fields if name.startswith("objectives.")} or {SECTIONS.default}


def fields_of(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of all fields of a recipe."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= fields_of(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def same_recipe(config: JobConfig, checkpoint: Path | None) -> None:
    """Says in one line which fields differ from those of the checkpoint that the run goes on from.

    Raises ValueError naming them where a resumed run cannot change them, or may not without
    `checkpoint.other_recipe`.
    """
    if checkpoint is None:
        return
    recipe_before = fields_of(of_run(lambda: read_yaml(checkpoint / "config.yaml")))
    former = {"optim.name": "adamw"} | {current_name(name): value for name, value in recipe_before.items()}
    now = fields_of(yaml.safe_load(to_yaml(config)))
    changes: dict[OnResume, list[str]] = {on_resume: [] for on_resume in OnResume}
    for name, value in now.items():
        if former.get(name, value) != value:
            resampled = name == "model.image_size" and config.checkpoint.other_resolution
            what_happens = OnResume.SAID if resampled else on_resume(name)
            changes[what_happens].append(f"{name}: {former[name]} -> {value}")
    for name in sorted(objectives_in(former) ^ objectives_in(now)):
        changes[OnResume.RECIPE].append(f"objectives.{name}: {'left out' if name in objectives_in(former) else 'new'}")
    if fixed := changes[OnResume.FIXED]:
        raise ValueError(
            f"checkpoint.resume: {checkpoint} is of another network or optimizer ({'; '.join(fixed)}): use its recipe, "
            "or another `out` to start anew"
        )
    recipe = changes[OnResume.RECIPE]
    if recipe and not config.checkpoint.other_recipe:
        raise ValueError(
            f"{'; '.join(recipe)}: not as in {checkpoint}, so that steps would have other samples or the optimizer's "
            "moments be those of another loss: bring the former back, or start a new run, or go on all the same by "
            "--checkpoint.other_recipe true"
        )
    if said := [*recipe, *changes[OnResume.COMPARED], *changes[OnResume.SAID]]:
        log.warning("other than in %s: %s", checkpoint, "; ".join(said))
