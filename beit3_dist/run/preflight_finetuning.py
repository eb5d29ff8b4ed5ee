"""Everything that can be wrong with a fine-tuning run is found before a process group starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from beit3_dist.checkpoint.formats import fit_initial
from beit3_dist.checkpoint.initial import InitialWeights
from beit3_dist.checkpoint.model_folder import TASK_HEAD
from beit3_dist.config import RunConfig, require, require_laid_out
from beit3_dist.data.text import TextTokenizer
from beit3_dist.looking import of_node
from beit3_dist.model.initialization import Values, zeros
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.opening import blaming
from beit3_dist.optimizers.registry import check_optimizer
from beit3_dist.parallel.deepspeed_config import deepspeed_config
from beit3_dist.parallel.float8 import check_float8
from beit3_dist.parallel.kernels import check_kernels
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.parallel.tensor import check_tensor
from beit3_dist.run.checkpointing import ReadyToTrain, starting_point
from beit3_dist.run.resumption import same_recipe
from beit3_dist.run.shared_memory import check_shared_memory, image_bytes
from beit3_dist.run.sources import finetuning_sources, same_sources
from beit3_dist.tasks.base import Task
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.tasks.data.augmentation import Mixing, Views
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.data.names import read_names
from beit3_dist.tasks.registry import task_class
from beit3_dist.trackers.registry import check_trackers


@dataclass
class FinetuneReady(ReadyToTrain):
    """What a fine-tuning run starts from."""

    values: Values
    """Initial values of a new run; zeros for one that goes on."""
    task: Task
    """Head, loss and metric."""
    train: Sequence[Example]
    """Training examples; none with `evaluate_only`."""
    validation: Sequence[Example]
    """Validation examples; none without validation."""
    views: Views
    """How images are seen."""
    mixing: Mixing | None
    """How training images are mixed."""


def resolve_epochs(config: FinetuneConfig, examples: int) -> FinetuneConfig:
    """The config with `epochs` turned into steps."""
    if config.epochs == 0:
        return config
    per_epoch = examples / config.batch.size
    optim = replace(config.optim, warmup_steps=round(config.warmup_epochs * per_epoch))
    return replace(config, steps=max(1, math.ceil(config.epochs * per_epoch)), optim=optim)


def prepare_finetuning(
    config: FinetuneConfig, mesh: Mesh, before: RunConfig | FinetuneConfig | None = None
) -> FinetuneReady:
    """Opens and checks everything, and resolves the config's epochs. Raises ValueError with one line that names the
    field or the file and the remedy.

    `before`: the run that `init_from` names, if it is still to come; all is checked then, but nothing can start.
    """
    check_trackers(config.trackers, mesh.is_first)
    require_laid_out(config)
    check_mixing(config, mesh)
    size = config.micro_batch(mesh.data)[0] * task_class(config.task).images * image_bytes(config.model.image_size)
    check_shared_memory(config.data, mesh, size, config.accumulation, bool(config.data.validation))
    check_optimizer(config.optim, deepspeed_config(config, mesh.data))
    check_tensor(config.model, mesh.tensor)
    check_kernels(config.kernels, config.attention_kernel, config.precision)
    check_float8(config)
    tokenizer = TextTokenizer(config.text_tokenizer)
    tokenizer.check_vocab(config.model.vocab_size)
    task = task_class(config.task)(config, tokenizer, names_of(config))
    train = () if config.evaluate_only else task.examples(train=True)
    validation = task.examples(train=False) if config.data.validation else ()
    task.config = config = resolve_epochs(config, len(train))
    checkpoint, state = starting_point(config, trains=not config.evaluate_only)
    require(
        not config.evaluate_only or checkpoint is not None or bool(config.init_from),
        f"evaluate_only: there is no model to evaluate: name one by init_from, or by checkpoint.resume=auto an `out` "
        f"that has a checkpoint, which {config.out} has not",
    )
    if not config.evaluate_only:
        sources = of_node(lambda: finetuning_sources(config, len(train), tokenizer))
        state.sources = same_sources(config, checkpoint, state.sources, sources)
        same_recipe(config, checkpoint)
    values, views = _values(config, task, checkpoint, before), task.views()
    mixing = Mixing(len(task.classes), config.mixup, config.cutmix, config.label_smoothing) if config.mixes else None
    return FinetuneReady(config, mesh, state, checkpoint, values, task, train, validation, views, mixing)


def check_mixing(config: FinetuneConfig, mesh: Mesh) -> None:
    """Mixup and CutMix take two neighbours of a micro-batch at a time."""
    size = config.micro_batch(mesh.data)[0]
    require(
        size % 2 == 0 or not config.mixes or config.evaluate_only,
        f"batch.size={config.batch.size} makes micro-batches of {size}, but mixup and cutmix take two images at a "
        "time: make them even by batch.size or batch.accumulation, or set mixup=0 and cutmix=0",
    )


def names_of(config: FinetuneConfig) -> list[str]:
    """Names of what the task tells apart, its answers or classes; none where it has no such."""
    if not task_class(config.task).needs_names:
        return []
    path = Path(config.data.answers)
    require(
        bool(config.data.answers) and path.is_file(),
        f"data.answers={config.data.answers!r}: task={config.task} needs a file with the name of each answer or class "
        "a line; tools/build_index.py writes it",
    )
    with blaming("data.answers"):
        return read_names(path)


def _values(
    config: FinetuneConfig, task: Task, checkpoint: Path | None, before: RunConfig | FinetuneConfig | None
) -> Values:
    """Initial values of a new run: of `init_from` where that has them, else a function of (seed, name). Zeros for one
    that goes on."""
    if checkpoint is not None:
        return zeros
    network = task.network(config.model, len(task.classes), config.dense, device="meta")
    weights: InitialWeights | dict[str, Tensor] = {}
    if config.init_from:
        shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        if before is None:
            weights = InitialWeights(config.init_from, config.model, shapes)
        else:
            theirs = dict(network_of(before).named_parameters())
            weights = fit_initial(theirs, before.model, config.model, shapes, before.out)
        lacking = [name for name in shapes if name.startswith((TASK_HEAD, "text_head.")) and name not in weights]
        require(
            not config.evaluate_only or not lacking,
            f"init_from: {config.init_from} has no head of task={config.task}, and evaluate_only teaches it none: name "
            "a fine-tuned model",
        )
    return lambda name, shape: weights[name] if name in weights else network.first_value(name, shape, config.seed)


def network_of(config: RunConfig | FinetuneConfig) -> nn.Module:
    """What a run trains, on the meta device."""
    if isinstance(config, RunConfig):
        return objectives_of(config).build()
    return task_class(config.task).network(config.model, len(names_of(config)), config.dense, device="meta")
