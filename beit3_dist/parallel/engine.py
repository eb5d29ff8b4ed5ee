"""One training step over DeepSpeed. The loop that calls it does not know how the model is spread over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from beit3_dist.config import RunConfig, TrainingConfig
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.block import Block
from beit3_dist.model.cut import cut_for, cuts_of
from beit3_dist.model.encoder import Encoder
from beit3_dist.model.head import Head
from beit3_dist.model.initialization import Values, materialize
from beit3_dist.model.text_decoder import TextDecoder
from beit3_dist.model.vision_tower import VisionTower
from beit3_dist.parallel.deepspeed_config import DEFAULT_BUCKET, deepspeed_config
from beit3_dist.parallel.finite import spoil_if_not_finite
from beit3_dist.parallel.flat_step import flatten_step, squares_of_model
from beit3_dist.parallel.float8 import product_of_blocks
from beit3_dist.parallel.fragments import KEPT, bounded, share_of, tell_places
from beit3_dist.parallel.graphs import CudaRecorder, Graphs
from beit3_dist.parallel.kernels import chosen_function, chosen_kernels, sizes_of, use_kernels
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.phases import Phases
from beit3_dist.parallel.pipeline import Pipeline, StagePlan, Stages, check_order_within, keep_stages, zero_gradients
from beit3_dist.parallel.reduction import PlainReduction
from beit3_dist.parallel.tensor import apply_tensor_parallelism, mark_model_parallel
from beit3_dist.parallel.token_norms import TokenNorms


@dataclass
class StepResult:
    """What a step produced, summed over all ranks and micro-batches."""

    losses: list[float]
    """Sum of each loss [K]."""
    correct: list[float]
    """Correct predictions of each [K]."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping; not finite where the gradient or the loss was not; 0 in
    evaluation."""

    @property
    def skipped(self) -> bool:
        """Whether the step has changed nothing, on any rank, because its loss or its gradient was not finite."""
        return not math.isfinite(self.grad_norm)


class Engine:
    """The model under its objective and DeepSpeed.

    build: the whole model without memory, on the meta device; what of it has no gradient there is frozen.
    values: (name, shape) -> initial value of a parameter, fp32 on the CPU.
    objective: model -> module that is called as (*micro_batch, step_counts, step) and returns the micro-batch's
    contribution to the loss, a scalar, and statistics [2, K] of its K losses; it has `columns` = K.
    optimizer: (model, whether its state is offloaded to the CPU) -> optimizer, called once the parameters have their
    final form.
    plan: the stages of a pipeline; needed where there is one.
    bounds: name -> interval of the parameters that every step leaves in one.
    passes: forward and backward passes of a micro-batch in training.
    """

    def __init__(
        self,
        config: TrainingConfig,
        groups: Groups,
        build: Callable[[], BEiT3],
        values: Values,
        objective: Callable[[Any], nn.Module],
        optimizer: Callable[[BEiT3, bool], torch.optim.Optimizer],
        plan: StagePlan | None = None,
        bounds: Mapping[str, tuple[float, float]] = MappingProxyType({}),
        passes: int = 1,
    ) -> None:
        self.mesh, self.groups = groups.mesh, groups
        settings = deepspeed_config(config, groups.mesh.data)
        built = _build_model(config, build(), groups, settings, values, plan)
        self.model, self.whole_shapes, self.cuts = built
        for stack in self.model.modules():
            if isinstance(stack, (Encoder, VisionTower, TextDecoder)):
                stack.recompute = config.recompute(self.mesh.pipeline_rank)
                stack.recompute_every = config.activation_checkpointing_every
        use_kernels(self.model, config.kernels, config.attention_kernel, product_of_blocks(config.precision))
        if chosen_kernels(config.kernels) != "torch":
            set_z3_leaf_modules(self.model, [Block])  # ZeRO-3 gathers a block as a whole, outside of what computes it
        zero = settings["zero_optimization"]
        # A bucket larger than the model only wastes memory (DeepSpeed's default is 2 GB in fp32).
        elements = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad)
        zero.setdefault("reduce_bucket_size", min(DEFAULT_BUCKET, elements))
        settings["zero_allow_untested_optimizer"] = True
        module: Any = objective(self.model)
        if plan is not None:
            check_order_within(groups.data)
            module = Stages(module, plan.of(self.mesh.pipeline_rank), config.model.layers, plan.tokens)
        with redirect_stdout(StringIO()):  # DeepSpeed prints its memory
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer(self.model, "offload_optimizer" in zero), config=settings, mpu=groups
            )
        dtype = next(self.model.parameters()).dtype
        if config.parallel.zero_stage == 0 and groups.mesh.data > 1 and self.deepspeed.zero_overlap_comm():
            PlainReduction(self.deepspeed, self.model.parameters())
        flatten_step(self.deepspeed, chosen_function("adamw", config.kernels, dtype, sizes_of(config.model)))
        if isinstance(config, RunConfig) and config.cuda_graphs:
            Graphs(self.model.blocks, CudaRecorder())
        tell_places(self.model, self.optimizer, self.cuts, groups, config.parallel.zero_stage)
        self._bounded = bounded(self.model, self.optimizer, bounds) if bounds else []
        self.zero_stage: int = config.parallel.zero_stage
        self._norms = TokenNorms(self.model.blocks, groups, self.zero_stage) if config.parallel.sequence else None
        self._schedule: Pipeline | Accumulation = (
            Pipeline(config, groups, self.deepspeed, module)
            if isinstance(module, Stages)
            else Accumulation(config.accumulation * passes, groups, self.deepspeed, module.columns, passes > 1)
        )

    def clocked_by(self, phases: Phases) -> None:
        """Has a clock tell its passes, its reduction and its optimizer's step apart."""
        of_phase = {"forward": "forward", "backward": "backward", "allreduce_gradients": "reduce", "step": "optimizer"}
        for method, phase in of_phase.items():
            setattr(self.deepspeed, method, phases.inside(phase, getattr(self.deepspeed, method)))
        if self._norms is not None:
            self._norms.add_up = phases.inside("reduce", self._norms.add_up)  # type: ignore[method-assign]

    def train_step(
        self, micro_batches: Iterable[tuple[Any, ...]], step_counts: Tensor, step: int, lr: float
    ) -> StepResult:
        """Forward and backward of the step's `accumulation` micro-batches, then the optimizer step, which is left out
        where the gradient or the loss is not finite: weights, moments and the optimizer's count stay as they were.

        `step_counts` [K]: masked positions (or samples) of the whole step over all ranks.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.deepspeed.train()
        totals = self._sum(self._schedule.train(micro_batches, step_counts, step))
        # Complete on the host when the gradient norm is, whose reading waits for the device; later the host runs ahead.
        totals = totals.to("cpu", non_blocking=True)
        if self._norms is not None:
            self._norms.add_up(self.optimizer)
        norm = self._plain_step() if self.zero_stage == 0 else self._zero_step()
        with torch.no_grad():
            for held, interval in self._bounded:
                held.clamp_(*interval)
        self._schedule.after_step()
        losses, correct = totals.tolist()
        return StepResult(losses, correct, norm)

    def weights(self) -> Iterator[tuple[str, Tensor, bool, bool]]:
        """What this rank computes with: name, values, whether the replicas hold the same ones, and whether the tensor
        ranks do."""
        parameters: Iterable[tuple[str, Any]] = self.model.named_parameters()
        for name, parameter in parameters:
            yield name, getattr(parameter, "ds_tensor", parameter), self.zero_stage < 3, name not in self.cuts

    def evaluate(self, micro_batches: Iterable[tuple[Any, ...]]) -> StepResult:
        """Forward only of `accumulation` micro-batches, without drop path."""
        self.deepspeed.eval()
        losses, correct = self._sum(self._schedule.evaluate(micro_batches)).tolist()
        return StepResult(losses, correct, 0.0)

    @torch.no_grad()
    def look(self, micro_batches: Iterable[tuple[Any, ...]], step: int, drops: bool = True) -> list[Any]:
        """What the objective sees in micro-batches before any of them is trained or evaluated on: called as
        (*micro_batch, None, step), without gradient; in training with its drop path if it `drops`. Collective."""
        training = self.model.training
        self.deepspeed.train(training and drops)
        seen = [self.deepspeed(*micro_batch, None, step) for micro_batch in micro_batches]
        self.deepspeed.train(training)
        return seen

    @torch.no_grad()
    def predict(self, inputs: Any, agree: Callable[[bool], bool]) -> Any:
        """What the objective's `predict=agree` makes of a batch. Collective: ZeRO-3 gathers parameters on the way, and
        ranks that take several passes have to `agree` on their number."""
        self.deepspeed.eval()
        return self.deepspeed(inputs, predict=agree)

    def _zero_step(self) -> float:
        """At ZeRO 1 to 3 DeepSpeed leaves the step out where the gradient norm is not finite."""
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        if norm is None:
            raise RuntimeError(f"DeepSpeed reports no gradient norm at ZeRO stage {self.zero_stage}")
        return float(norm)

    def _plain_step(self) -> float:
        """At ZeRO-0 DeepSpeed would step with any gradient."""
        norm = float(self._plain_grad_norm())
        if math.isfinite(norm):
            self.deepspeed.step()
        else:
            self.deepspeed.zero_grad()
        return norm

    def _plain_grad_norm(self) -> Tensor:
        """At ZeRO-0 DeepSpeed keeps no norm; the gradients lie reduced over the replicas on every rank."""
        gradients = ((p.grad, p) for p in self.model.parameters() if p.grad is not None)
        squares = squares_of_model(gradients, torch.float32, self.mesh.device)
        dist.all_reduce(squares, group=self.groups.model)
        return squares.sqrt()

    def _sum(self, totals: Tensor) -> Tensor:
        self.groups.sum_over_data(totals)
        dist.all_reduce(totals, group=self.groups.pipeline)  # zeros on all stages but the last
        return totals


class Accumulation:
    """The schedule without a pipeline: one micro-batch after the other."""

    def __init__(self, micro_batches: int, groups: Groups, engine: Any, columns: int, partial: bool = False) -> None:
        """`micro_batches`: forward and backward passes of a step. `partial`: some are of a part of the model alone."""
        self._engine, self._mesh, self._micro_batches = engine, groups.mesh, micro_batches
        self._columns, self._partial = columns, partial

    def train(self, micro_batches: Iterable[tuple[Any, ...]], step_counts: Tensor, step: int) -> Tensor:
        """Forward and backward of a step's micro-batches; their statistics [2, K]."""
        totals = torch.zeros(2, self._columns, device=self._mesh.device, dtype=torch.float64)
        for number, micro_batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(number == self._micro_batches - 1)
            contribution, statistics = self._engine(*micro_batch, step_counts, step)
            # DeepSpeed averages gradients over the data-parallel ranks; the contributions are to be summed.
            self._engine.backward(spoil_if_not_finite(contribution) * self._mesh.data, scale_wrt_gas=False)
            totals += statistics
        return totals

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[tuple[Any, ...]]) -> Tensor:
        no_loss = torch.ones(self._columns, device=self._mesh.device)  # only the statistics are wanted
        totals = torch.zeros(2, self._columns, device=self._mesh.device, dtype=torch.float64)
        for micro_batch in micro_batches:
            totals += self._engine(*micro_batch, no_loss, 0)[1]
        return totals

    def after_step(self) -> None:
        """A pass may leave parameters without gradient, which the next step's first one does not overwrite either."""
        if self._partial:
            zero_gradients(self._engine)


def _build_model(
    config: TrainingConfig,
    model: BEiT3,
    groups: Groups,
    settings: dict[str, Any],
    values: Values,
    plan: StagePlan | None,
) -> tuple[BEiT3, dict[str, torch.Size], dict[str, int]]:
    """This rank's part of the model, and of the whole one the shapes of all parameters and how they are cut.

    `model` comes on the meta device and is cut to the rank's parts and stages; then it gets memory and values module by
    module; under ZeRO-3 each is sharded before the next one is made, so that no rank ever holds the whole model.
    """
    mesh, dtype = groups.mesh, torch.bfloat16 if config.in_bf16 else torch.float32
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    kept: dict[str, tuple[int, Tensor]] = {}
    whole_shapes, cuts = {name: parameter.shape for name, parameter in model.named_parameters()}, cuts_of(model)
    if mesh.tensor > 1:
        apply_tensor_parallelism(model, groups.tensor, config.parallel.sequence)
    if plan is not None:
        keep_stages(model, plan.of(mesh.pipeline_rank), is_first=mesh.pipeline_rank == 0, is_last=mesh.is_last_stage)

    def part_of_value(name: str, shape: torch.Size) -> Tensor:
        if mesh.data_rank > 0 and name not in frozen:
            return torch.zeros(shape)  # (*) DeepSpeed gives all replicas the first one's values
        value, cut = values(name, whole_shapes[name]), cut_for(cuts, name, mesh.tensor_rank, mesh.tensor)
        part = value if cut is None else cut.of(value)
        if name in frozen and config.parallel.zero_stage > 0:
            kept[name] = share_of(part, mesh.data_rank, mesh.data)
        return part

    modules = [(name, module) for name, module in model.named_children() if name != "blocks"]
    modules += [(f"blocks.{i}", block) for i, block in model.blocks.items()]
    for prefix, module in modules:
        materialize(module, part_of_value, mesh.device, dtype, prefix=f"{prefix}.")
        if config.parallel.zero_stage == 3:
            deepspeed.zero.Init(
                module=module, config_dict_or_path=settings, dtype=dtype, data_parallel_group=groups.data, mpu=groups
            )
    if config.parallel.zero_stage == 3:
        for module in model.modules():
            if isinstance(module, (Linear, Head)):
                module.compute = linear_that_lets_go
    for name, parameter in model.named_parameters():
        if name in kept:
            setattr(parameter, KEPT, kept[name])
    mark_model_parallel(model, mesh.tensor_rank, cuts)
    return model, whole_shapes, cuts


def linear_that_lets_go(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a `Linear` whose weight ZeRO-3 shards: what it leaves for the backward pass is the parameter,
    where torch's own function would keep the gathered values from one pass to the other. The same numbers: both are one
    product of two matrices with the bias in it."""
    if x.dim() == 2:
        return zero3_linear_wrap(x, weight, bias)
    return zero3_linear_wrap(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
