"""One training step over DeepSpeed. The loop that calls it does not know how the model is spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.config import RunConfig
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.initialization import Values, materialize
from beit3_dist.parallel.deepspeed_config import deepspeed_config
from beit3_dist.parallel.mesh import Mesh


@dataclass
class StepResult:
    """What a step produced, summed over all ranks and micro-batches."""

    cross_entropy: list[float]
    """Sums of the four losses."""
    correct: list[float]
    """Correct predictions."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping; 0 in evaluation."""


class Engine:
    """The model under its objective and DeepSpeed.

    values: (name, shape) -> initial value of a parameter, fp32 on the CPU.
    objective: model -> module that is called as (*micro_batch, step_counts, step) and returns the micro-batch's
    contribution to the loss, a scalar, and statistics [2, 4].
    optimizer: (model, whether its state is offloaded to the CPU) -> optimizer, called once the parameters have their
    final form.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        values: Values,
        objective: Callable[[BEiT3], nn.Module],
        optimizer: Callable[[BEiT3, bool], torch.optim.Optimizer],
    ) -> None:
        self.mesh = mesh
        settings = deepspeed_config(config, mesh.world)
        model = _build_model(config, mesh, settings, values)
        model.blocks.recompute = config.activation_checkpointing
        zero = settings["zero_optimization"]
        # A bucket larger than the model only wastes memory (DeepSpeed's default is 2 GB in fp32).
        zero.setdefault("reduce_bucket_size", min(100_000_000, sum(_numel(p) for p in model.parameters())))
        settings["zero_allow_untested_optimizer"] = True
        with redirect_stdout(StringIO()):  # DeepSpeed prints its memory
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=objective(model), optimizer=optimizer(model, "offload_optimizer" in zero), config=settings
            )
        self.model = model
        self.accumulation = config.batch.accumulation
        self.zero_stage = config.parallel.zero_stage

    @property
    def owns_state(self) -> bool:
        """Whether this rank holds weights and moments that no other rank saves. At ZeRO-0 all ranks hold the same."""
        return self.zero_stage > 0 or self.mesh.is_first

    def train_step(
        self, micro_batches: Iterable[tuple[Any, ...]], step_counts: Tensor, step: int, lr: float
    ) -> StepResult:
        """Forward and backward of the step's `accumulation` micro-batches, then the optimizer step.

        `step_counts` [4]: masked positions of the whole step over all ranks.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        totals = torch.zeros(2, 4, device=self.mesh.device, dtype=torch.float64)
        self.deepspeed.train()
        for i, micro_batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(i == self.accumulation - 1)
            contribution, statistics = self.deepspeed(*micro_batch, step_counts, step)
            # DeepSpeed averages gradients over the data-parallel ranks; the contributions are to be summed.
            self.deepspeed.backward(contribution * self.mesh.world, scale_wrt_gas=False)
            totals += statistics
        norm = self._plain_grad_norm() if self.zero_stage == 0 else None
        self.deepspeed.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
            if norm is None:
                raise RuntimeError(f"DeepSpeed reports no gradient norm at ZeRO stage {self.zero_stage}")
        return self._reduce(totals, float(norm))

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[tuple[Any, ...]]) -> StepResult:
        """Forward only, without drop path."""
        no_loss = torch.ones(4, device=self.mesh.device)  # only the statistics are wanted
        totals = torch.zeros(2, 4, device=self.mesh.device, dtype=torch.float64)
        self.deepspeed.eval()
        for micro_batch in micro_batches:
            totals += self.deepspeed(*micro_batch, no_loss, 0)[1]
        return self._reduce(totals, 0.0)

    def _plain_grad_norm(self) -> Tensor:
        """At ZeRO-0 DeepSpeed keeps no norm; the gradients lie whole and reduced on every rank."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _reduce(self, totals: Tensor, norm: float) -> StepResult:
        dist.all_reduce(totals)
        cross_entropy, correct = totals.tolist()
        return StepResult(cross_entropy, correct, norm)


def _numel(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _build_model(config: RunConfig, mesh: Mesh, settings: dict[str, Any], values: Values) -> BEiT3:
    """Builds on the meta device, then gives memory and values piece by piece; under ZeRO-3 each piece is sharded
    before the next one is made, so that no rank ever holds the whole model."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = BEiT3(config.model, device="meta")
    pieces = [(name, module) for name, module in model.named_children() if name != "blocks"]
    pieces += [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    for prefix, piece in pieces:
        materialize(piece, values, mesh.device, dtype, prefix=f"{prefix}.")
        if config.parallel.zero_stage == 3:
            deepspeed.zero.Init(module=piece, config_dict_or_path=settings, dtype=dtype)
    return model
