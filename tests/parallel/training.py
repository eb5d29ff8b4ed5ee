"""The same few training steps by our engine in any layout, and by a plain torch loop in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beit3_dist.config import (
    BatchConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Recompute,
    RunConfig,
)
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import Tokenize
from beit3_dist.model import BEiT3
from beit3_dist.model.cut import cut_for, cuts_of
from beit3_dist.model.initialization import initial_value, materialize, named_generator
from beit3_dist.model.trained import freeze
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.fragments import fragments, optimizer_state
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.pipeline import plan_stages
from beit3_dist.train.feed import prepared
from beit3_dist.train.optimizer import parameter_groups, pretraining_optimizer
from beit3_dist.train.schedule import learning_rate
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes, random_micro_batch

SMALL = dict(
    layers=4,
    width=64,
    heads=4,
    ffn_width=128,
    patch_size=8,
    image_size=32,
    vocab_size=150,
    visual_vocab_size=40,
    max_text_length=20,
    drop_path=0.2,
)
FUSION: dict[str, Any] = dict(
    layers=6, attention="per_modality", vl_expert_layers=0, fusion_layers=3, connected_every=1, language_layers=2
)
"""All kinds of layers that fuse pairs above two encoders."""
MODELS = {
    "paper": ModelConfig(**SMALL, attention="shared", sub_layernorm=False, vl_expert_layers=2),
    "released": ModelConfig(**SMALL, attention="per_modality", sub_layernorm=True, vl_expert_layers=0),
    "tower": ModelConfig(**SMALL, ffn="shared", vl_expert_layers=0),
    "fusion": ModelConfig(**SMALL | FUSION),
    "writer": ModelConfig(**SMALL | FUSION | {"decoder_layers": 2}),
    # Of the shapes of tests/integration/runs.py, so that both find the same compiled code in torch's cache.
    "shallow": ModelConfig(**SMALL | {"layers": 2, "width": 32, "heads": 2, "ffn_width": 64}, vl_expert_layers=1),
}
SAMPLES = 16
"""Images, texts and pairs of a global batch."""
SEED = 11
SMALL_PIECES = Path(__file__).with_name("small_pieces.json")
"""DeepSpeed's buffers in the proportion to these models that the defaults have to large ones: several reduce buckets a
step, and under ZeRO-3 matrices are gathered and released again. With the defaults all of a model this small stays
gathered, and nothing of that would run."""


def run_config(
    model: str,
    *,
    zero_stage: int,
    accumulation: int,
    data_parallel: int,
    precision: str = "fp32",
    clip_norm: float = 3.0,
    activation_checkpointing: Recompute | list[Recompute] = "none",
    activation_checkpointing_every: int = 1,
    tensor: int = 1,
    sequence: bool = False,
    pipeline: int = 1,
    chunks: int = 1,
    steps: int = 5,
    sgd: bool = False,
    kernels: str = "torch",
    layers: int | None = None,
) -> RunConfig:
    """A run on a global batch of SAMPLES images, texts and pairs. `sgd`: with the rate of plain gradient descent.
    `layers`: None: as many as the model has."""
    return RunConfig(
        out="unused",
        text_tokenizer="unused",
        image_tokenizer="unused",
        seed=SEED,
        steps=steps,
        precision=precision,
        kernels=kernels,
        data=DataConfig(images="unused", texts="unused", pairs="unused", text_length=20, caption_length=20),
        model=replace(MODELS[model], layers=layers or MODELS[model].layers),
        activation_checkpointing=activation_checkpointing,
        activation_checkpointing_every=activation_checkpointing_every,
        deepspeed_config=str(SMALL_PIECES),
        objectives={NAME: MaskedDataModelingConfig(pair_image_weight=0.5)},
        batch=BatchConfig(images=SAMPLES, texts=SAMPLES, pairs=SAMPLES, accumulation=accumulation),
        parallel=ParallelConfig(
            zero_stage=zero_stage, tensor=tensor, sequence=sequence, pipeline=pipeline, chunks=chunks
        ),
        optim=OptimConfig(lr=0.5 if sgd else 1e-3, warmup_steps=2, clip_norm=clip_norm),
    )


def micro_batches(model: ModelConfig, step: int, parts: int, of: range) -> list[MicroBatch]:
    """Some of the `parts` micro-batches of a step's global batch. Numbers of masked words differ among them."""
    count = SAMPLES // parts
    return [random_micro_batch(model, images=count, texts=count, pairs=count, seed=1000 * step + part) for part in of]


def starting_value(name: str, shape: torch.Size, config: RunConfig) -> torch.Tensor:
    """A parameter before the first step: the initial value, but biases, gains of norms and tokens spread around theirs.

    Zero biases hide mistakes (one that is added twice), and have no size that an error could be relative to: after a
    few steps they are what AdamW made of gradients, and AdamW makes up to lr / eps = 1000 of rounding where a gradient
    is nearly zero. In one process, a change of all weights by 6e-8 then strays up to 1.4e-5 from the bound's measure.
    """
    value = initial_value(name, shape, config.model, config.seed)
    if value.min() == value.max():
        value += 0.05 * torch.randn(shape, generator=named_generator(config.seed, f"spread of {name}"))
    return value


def build(model: BEiT3, offload: bool, config: RunConfig, sgd: bool) -> torch.optim.Optimizer:
    """The run's optimizer, or plain gradient descent, which does not hide a wrong scale of the gradients."""
    if sgd:
        return torch.optim.SGD(parameter_groups(model, 0.0), lr=config.optim.lr)
    return pretraining_optimizer(model, offload, config)


@dataclass
class Trace:
    """What a run did."""

    losses: list[list[float]] = field(default_factory=list)
    """The four losses per step."""
    grad_norms: list[float] = field(default_factory=list)
    """Norm before clipping, per step."""
    first_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    """Gradients of the first step after clipping, read off Adam's first moment."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights after the last step."""
    initial: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights before the first step."""


def engine_run(
    groups: Groups, config: RunConfig, sgd: bool = False, tokenize: Tokenize | None = None, multiple: int | None = None
) -> dict[str, Any]:
    """One rank of a run by our engine. Returns plain numbers and arrays. `tokenize`: an image tokenizer that runs.
    `multiple`: what captions are filled up to; None: as the device has it."""
    mesh, objectives = groups.mesh, objectives_of(config)
    objectives.multiple = objectives.multiple if multiple is None else multiple
    engine = Engine(
        config,
        groups,
        objectives.build,
        lambda name, shape: starting_value(name, shape, config),
        plan=plan_stages(config, *objectives.largest(mesh.data)),
        objective=lambda model: PretrainingModule(model, objectives, config.seed),
        optimizer=lambda model, offload: build(model, offload, config, sgd),
    )
    tokenize, parts = tokenize or precomputed_codes(config.model), mesh.data * config.batch.accumulation
    record: dict[str, Any] = {"losses": [], "grad_norms": [], "tensor_rank": mesh.tensor_rank}
    record["initial"] = _weights(engine)
    for step in range(config.steps):
        # Micro-batch m of replica r is number m * data + r of the step's global batch.
        mine = micro_batches(config.model, step, parts, range(mesh.data_rank, parts, mesh.data))
        counts = torch.tensor(host_totals(mine, objectives).counts, device=mesh.device)
        groups.sum_over_data(counts)
        result = engine.train_step(
            (prepared(objectives, b, mesh, tokenize) for b in mine),
            counts,
            step,
            learning_rate(step, config.steps, config.optim),
        )
        record["losses"].append([c / n for c, n in zip(result.losses, counts.tolist(), strict=True)])
        record["grad_norms"].append(result.grad_norm)
        if step == 0 and not sgd and config.optim.name in ("adamw", "lamb"):
            record["first_moments"] = {
                f.name: (f.start, optimizer_state(engine.optimizer, f)["exp_avg"].cpu().numpy().copy())
                for f in fragments(engine.model, engine.optimizer)
                if f.trained
            }
    record["weights"] = _weights(engine)
    if config.parallel.zero_stage == 3:
        parameters: Iterable[Any] = engine.model.parameters()
        assert all(p.numel() == 0 for p in parameters if p.ds_numel > 1000), "ZeRO-3 keeps matrices gathered"
    return record


def _weights(engine: Engine) -> dict[str, tuple[int, np.ndarray]]:
    """This rank's pieces of the master weights, by name: where each begins, and its values."""
    pieces = fragments(engine.model, engine.optimizer)
    return {f.name: (f.start, f.slice_of(f.flat.detach()).cpu().numpy().copy()) for f in pieces}


def assemble(records: list[dict[str, Any]], config: RunConfig) -> Trace:
    """The whole run from its ranks' records; all ranks must agree on what is global."""
    for record in records[1:]:
        assert record["losses"] == records[0]["losses"] and record["grad_norms"] == records[0]["grad_norms"]
    model = BEiT3(config.model, device="meta")
    shapes, cuts = {n: p.shape for n, p in model.named_parameters()}, cuts_of(model)
    ranks = 1 + max(record["tensor_rank"] for record in records)

    def local(key: str, name: str, shape: torch.Size, tensor_rank: int) -> torch.Tensor:
        cut = cut_for(cuts, name, tensor_rank, ranks)
        slice_shape = shape if cut is None else torch.Size(cut.shape(tuple(shape)))
        flat = np.full(slice_shape.numel(), np.nan, dtype=np.float32)
        for record in records:
            if record["tensor_rank"] == tensor_rank and name in record[key]:
                start, piece = record[key][name]
                flat[start : start + len(piece)] = piece
        assert not np.isnan(flat).any(), f"no rank holds all of {name}"
        return torch.from_numpy(flat).view(slice_shape)

    def whole(key: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, shape in shapes.items():
            if not any(name in record[key] for record in records):
                continue
            slices = [local(key, name, shape, rank) for rank in range(ranks)]
            if name not in cuts:
                for other in slices[1:]:
                    assert torch.equal(slices[0], other), f"the tensor ranks' copies of {name} have drifted apart"
            tensors[name] = unshard(cuts.get(name), slices, tuple(shape))
        return tensors

    first_gradients = {}
    if "first_moments" in records[0]:
        first_gradients = {n: m / (1 - config.optim.beta1) for n, m in whole("first_moments").items()}
    return Trace(
        losses=records[0]["losses"],
        grad_norms=records[0]["grad_norms"],
        first_gradients=first_gradients,
        weights=whole("weights"),
        initial=whole("initial"),
    )


def plain_run(
    config: RunConfig,
    parts: int,
    sgd: bool = False,
    make: Callable[[BEiT3], torch.optim.Optimizer] | None = None,
) -> Trace:
    """The definition: one process, fp32, plain torch, the whole global batch of `parts` micro-batches. `make`: another
    optimizer than AdamW."""
    model = BEiT3(config.model, device="meta")
    materialize(model, lambda name, shape: starting_value(name, shape, config), "cpu")
    freeze(model, config.train_only)
    objectives = objectives_of(config)
    objective = PretrainingModule(model, objectives, config.seed).train()
    optim = config.optim
    if sgd:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=optim.lr)
    elif make is not None:
        optimizer = make(model)
    else:
        betas = (optim.beta1, optim.beta2)
        groups = parameter_groups(model, optim.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps)
    tokenize, trace = precomputed_codes(config.model), Trace()
    trace.initial = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(config.steps):
        batches = micro_batches(config.model, step, parts, range(parts))
        counts = torch.tensor(host_totals(batches, objectives).counts)
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches:
            contribution, statistics = objective(
                *objectives.prepare(batch, torch.device("cpu"), tokenize), counts, step
            )
            contribution.backward()
            sums += statistics[0]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        if step == 0:
            trace.first_gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, optim) * group.get("lr_scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trace.losses.append((sums / counts).tolist())
        trace.grad_norms.append(norm.item())
    trace.weights = {n: p.detach() for n, p in model.named_parameters()}
    return trace


def unshard(dimension: int | None, slices: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The whole parameter from its ranks' slices, without padding."""
    if dimension is None:
        return slices[0]
    return torch.cat(slices, dim=dimension).narrow(dimension, 0, shape[dimension])
