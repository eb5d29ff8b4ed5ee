"""Everything that can be wrong is found before a process group starts: files, sizes, data, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from beit3_dist.checkpoint.formats import fit_initial
from beit3_dist.checkpoint.initial import InitialWeights
from beit3_dist.config import RunConfig, require, require_laid_out
from beit3_dist.data.batch import MixedBatches
from beit3_dist.data.index import Share
from beit3_dist.image_tokenizer.codes import PrecomputedCodes, open_codes
from beit3_dist.image_tokenizer.files import open_vqkd
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import tokenizer_view_size
from beit3_dist.looking import of_node
from beit3_dist.model.initialization import Values, zeros
from beit3_dist.objectives.contrastive import Contrastive
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.objectives.prefix_language_modeling import PrefixLanguageModeling
from beit3_dist.objectives.registry import objectives_by_stream, objectives_of
from beit3_dist.objectives.together import Objectives
from beit3_dist.optimizers.registry import check_optimizer
from beit3_dist.parallel.deepspeed_config import deepspeed_config
from beit3_dist.parallel.float8 import check_float8
from beit3_dist.parallel.graphs import check_graphs
from beit3_dist.parallel.kernels import check_kernels
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.parallel.pipeline import check_pipeline, check_trained_stages, plan_stages
from beit3_dist.parallel.tensor import check_tensor
from beit3_dist.run.checkpointing import ReadyToTrain, starting_point
from beit3_dist.run.resumption import same_recipe
from beit3_dist.run.shared_memory import check_shared_memory, image_bytes
from beit3_dist.run.sources import pretraining_sources, same_sources
from beit3_dist.tasks.data.zero_shot import ZeroShotData, open_zero_shot
from beit3_dist.trackers.registry import check_trackers


@dataclass
class Ready(ReadyToTrain):
    """What pretraining starts from."""

    values: Values
    """Initial values of a new run; zeros for one that goes on."""
    objectives: Objectives
    """What is learnt."""
    teachers: dict[str, Any]
    """Objective -> the frozen networks that it learns from, on the CPU; None: it has none."""
    image_tokenizer: VQKD | None
    """The tokenizer of the image targets, on the CPU; None: no objective has any."""
    train: MixedBatches
    """The training streams of this rank."""
    held_out: MixedBatches | None
    """The held-out streams; None without validation."""
    train_codes: PrecomputedCodes | None
    """Codes of the training views; None: the tokenizer computes them."""
    held_out_codes: PrecomputedCodes | None
    """Codes of the held-out views."""
    zero_shot: ZeroShotData | None
    """What validations score beside the losses."""


def prepare_run(config: RunConfig, mesh: Mesh, before: RunConfig | None = None) -> Ready:
    """Opens and checks everything. Raises ValueError with one line that names the field and the remedy.

    `before`: the run that `init_from` names, if it is still to come; all is checked then, but nothing can start.
    """
    check_trackers(config.trackers, mesh.is_first)
    require_laid_out(config)
    config.micro_batch(mesh.data)
    check_optimizer(config.optim, deepspeed_config(config, mesh.data))
    check_tensor(config.model, mesh.tensor)
    check_kernels(config.kernels, config.attention_kernel, config.precision)
    check_float8(config)
    check_pipeline(config)
    objectives = objectives_of(config)
    for objective in objectives:
        require(
            not objective.second_pass or config.parallel.pipeline == 1,
            f"parallel.pipeline={config.parallel.pipeline}: the objective {objective.name} takes a second pass over "
            "the model, which a pipeline cannot: use parallel.pipeline=1",
        )
    check_trained(config, mesh, objectives)
    check_graphs(config, [each.name for each in objectives if each.second_pass or any(v.prefix_by for v in each.views)])
    check_pictures(config, objectives)
    if config.gradient_masking.every:
        objectives_by_stream(config, ("images", "texts"))
    checkpoint, state = starting_point(config)
    own = view = config.model.image_size  # looked up codes need no view for the tokenizer
    image_tokenizer = None
    if objectives.coded:
        image_tokenizer = open_vqkd(config.image_tokenizer)
        view = tokenizer_view_size(image_tokenizer, config.image_tokenizer, config.model)
    teachers = {objective.name: objective.open_teachers() for objective in objectives}
    check_loaders(config, mesh, view if view != own and not config.image_codes else 0)
    ranks = mesh.data_rank, mesh.data
    # Of new shards, every process takes some, its fellows in a replica too.
    shared: dict[str, Any] = {"annotators": [*objectives], "share": Share(mesh.rank, mesh.world)}
    train = MixedBatches(config, own if config.image_codes else view, *ranks, **shared)
    if any(getattr(objective.config, "whole_words", False) for objective in objectives):
        _ = train.tokenizer.begins  # which raises where pieces do not tell
    train.restore(state.readers, state.step > 0)
    weights = {field: path for objective in objectives for field, path in objective.teachers.items()}
    sources = of_node(lambda: pretraining_sources(config, train, weights))
    state.sources = same_sources(config, checkpoint, state.sources, sources)
    same_recipe(config, checkpoint)
    train_codes = open_codes(config, view, False, train)
    held_out = held_out_codes = None
    if config.eval.every:
        held_out_view = own if config.eval.image_codes else view
        held_out = MixedBatches(config, held_out_view, *ranks, held_out=True, **shared)
        held_out_codes = open_codes(config, view, True, held_out)
    zero_shot = open_zero_shot(config.eval, config.data)
    if zero_shot is not None:
        check_zero_shot(config)
    values = _values(config, checkpoint, objectives, before)
    opened = objectives, teachers, image_tokenizer, train, held_out, train_codes, held_out_codes, zero_shot
    return Ready(config, mesh, state, checkpoint, values, *opened)


def check_trained(config: RunConfig, mesh: Mesh, objectives: Objectives) -> None:
    """Raises ValueError where `train_only` fits neither the model nor the stages of its pipeline."""
    if (trained := objectives.trained) is None:
        return
    if (plan := plan_stages(config, *objectives.largest(mesh.data))) is not None:
        check_trained_stages(plan, trained)


def check_zero_shot(config: RunConfig) -> None:
    """Raises ValueError where the run does not learn what it is scored by."""
    by_contrast, by_words = (Contrastive.name, "contrast"), (PrefixLanguageModeling.name, "prefix language modelling")
    needs = {"retrieval": by_contrast, "captions": by_words}
    if not config.eval.classes_train:  # else its features are scored, whatever it learns
        needs["classes"] = by_contrast
    for field in config.eval.scored:
        objective, called = needs.get(field, (None, ""))
        require(
            objective is None or objective in config.objectives,
            f"eval.{field} is scored by {called}, which the run does not learn: give the section "
            f"objectives.{objective}, or leave eval.{field} out",
        )
        require(
            config.parallel.pipeline == 1,
            f"eval.{field}: a pipeline encodes nothing beside its training: use parallel.pipeline=1, or leave "
            f"eval.{field} out and score checkpoints by tools/evaluate.py",
        )
    require(
        not config.eval.captions or not config.model.fusion_layers or config.model.decoder_layers > 0,
        f"eval.captions: with model.fusion_layers={config.model.fusion_layers} a decoder writes: give "
        "model.decoder_layers, or leave eval.captions out",
    )
    require(
        not (config.eval.captions and config.parallel.sequence),
        "eval.captions: words are written one at a time, which sequence parallelism cannot share out: use "
        "parallel.sequence=false, or leave eval.captions out and score checkpoints by tools/evaluate.py",
    )


def check_pictures(config: RunConfig, objectives: Objectives) -> None:
    """Raises ValueError where validations cannot draw what `eval.pictures` asks for."""
    if not config.eval.pictures:
        return
    unless = "or use eval.pictures=0 and tools/report.py"
    require(bool(config.eval.every), f"eval.pictures={config.eval.pictures}: give eval.every, {unless}")
    require(
        config.parallel.pipeline == 1,
        f"eval.pictures={config.eval.pictures}: a pipeline guesses nothing beside its training: use "
        f"parallel.pipeline=1, {unless}",
    )
    masked = [objective for objective in objectives if objective.name == MaskedDataModeling.name]
    require(
        any(objective.coded for objective in masked) and not config.image_codes,
        f"eval.pictures={config.eval.pictures} draws what an image tokenizer says of masked images, which this run has "
        f"none of: give objectives.masked_data_modeling and image_tokenizer, without image_codes, {unless}",
    )


def check_loaders(config: RunConfig, mesh: Mesh, view: int = 0) -> None:
    """`check_shared_memory` for the loaders of pretraining. `view`: side of the image tokenizer's views, where it has
    some of its own."""
    # Where each process reads a part of every micro-batch, as streams without random access want it, it is less.
    images, _, pairs = config.micro_batch(mesh.data)
    size = (images + pairs) * image_bytes(config.model.image_size, view)
    check_shared_memory(config.data, mesh, size, config.accumulation, config.eval.every > 0, _reads)


def _reads(mesh: Mesh) -> bool:
    """Whether a process has loaders; see `feed.Feed`."""
    return mesh.tensor_rank == 0 and mesh.pipeline_rank in (0, mesh.pipeline - 1)


def _values(config: RunConfig, checkpoint: Path | None, objectives: Objectives, before: RunConfig | None) -> Values:
    """Initial values of a new run: of `init_from` where that has them, else a function of (seed, name). Zeros for one
    that goes on."""
    if checkpoint is not None:
        return zeros
    weights: InitialWeights | dict[str, Tensor] = {}
    if config.init_from:
        shapes = {name: parameter.shape for name, parameter in objectives.build().named_parameters()}
        if before is None:
            weights = InitialWeights(config.init_from, config.model, shapes)
        else:
            weights = fit_initial(
                dict(objectives_of(before).build().named_parameters()), before.model, config.model, shapes, before.out
            )
    return lambda name, shape: weights[name] if name in weights else objectives.first_value(name, shape, config.seed)
