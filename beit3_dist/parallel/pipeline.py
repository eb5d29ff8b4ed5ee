"""Pipeline parallelism: the blocks are cut into stages, scheduled by torch.distributed.pipelining over DeepSpeed.

DeepSpeed's own pipeline refuses ZeRO-2 and 3. Here each process has one DeepSpeed engine around its part of the model,
ZeRO shards it over the replicas of that part, and torch's 1F1B schedule (Narayanan et al. 2021) moves micro-batches
through the stages. What that needs from DeepSpeed is marked with (*); leaving one out fails silently or hangs, and
tests/parallel/test_conditions.py shows each.

Micro-batches differ in length, so activations cross stages padded to a fixed capacity and are unpadded inside.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from beit3_dist.config import RunConfig, TrainingConfig, require
from beit3_dist.model.beit3 import BEiT3, MixedInputs
from beit3_dist.model.encoder import kind_of
from beit3_dist.model.token_layout import TokenLayout
from beit3_dist.parallel.finite import spoil_if_not_finite
from beit3_dist.parallel.mesh import Groups

OF_FIRST = ("vision_embedding", "language_embedding")
"""What the first stage has beside its layers; the last one has all else."""


def check_pipeline(config: RunConfig) -> None:
    """Raises ValueError where the run cannot be cut into its stages."""
    stages, chunks, accumulation = config.parallel.pipeline, config.parallel.chunks, config.batch.accumulation
    require(
        stages * chunks <= config.model.layers,
        f"parallel.pipeline={stages} x parallel.chunks={chunks} stages exceed model.layers={config.model.layers}",
    )
    require(
        accumulation >= stages,
        f"batch.accumulation={accumulation} is below parallel.pipeline={stages}: 1F1B needs a micro-batch a stage",
    )
    require(
        chunks == 1 or accumulation % stages == 0,
        f"batch.accumulation={accumulation} must be a multiple of parallel.pipeline={stages} to interleave",
    )


def balanced_stages(costs: Sequence[float], before: float, after: float, stages: int) -> list[range]:
    """Cuts layers of the given costs into consecutive stages so that the dearest stage is as cheap as possible.

    before, after: what the first stage (embedding) and the last one (heads, targets) have to do besides.
    """
    layers = len(costs)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)

    def cost_of(stage: int, begin: int, end: int) -> float:
        return total[end] - total[begin] + before * (stage == 0) + after * (stage == stages - 1)

    # best[s][end]: (cost of the dearest of the stages 0..s that hold the layers before `end`, where stage s begins)
    best = [{end: (cost_of(0, 0, end), 0) for end in range(1, layers + 1)}]
    for stage in range(1, stages):
        best.append(
            {
                end: min((max(best[-1][begin][0], cost_of(stage, begin, end)), begin) for begin in range(stage, end))
                for end in range(stage + 1, layers + 1)
            }
        )
    ranges, end = [], layers
    for stage in reversed(range(stages)):
        begin = best[stage][end][1]
        ranges.append(range(begin, end))
        end = begin
    return ranges[::-1]


@dataclass(frozen=True)
class StagePlan:
    """How the model is cut into the stages of a pipeline."""

    stages: list[range]
    """The layers of each of the `pipeline x chunks` stages."""
    pipeline: int
    """Pipeline ranks; rank r runs the stages r, r + pipeline, ..."""
    tokens: int
    """Rows of the activations that cross between stages."""

    def of(self, rank: int) -> list[range]:
        return self.stages[rank :: self.pipeline]


def plan_stages(config: RunConfig, largest: TokenLayout, last_flops: float) -> StagePlan | None:
    """Stages balanced by FLOPs; None without a pipeline.

    largest: of a micro-batch with all texts at full length. last_flops: what the last stage has to do with it besides:
    forward and backward of the heads, and the image targets.
    """
    if config.parallel.pipeline == 1:
        return None
    model, d = config.model, config.model.width
    images, tokens = sum(g.samples for g in largest.patch_groups if g.patches), sum(largest.segments)
    # Per block: projections and FFN; attention's own products are left out.
    block = 3.0 * (8 * d * d + 4 * d * model.ffn_width)
    a, b, c, _ = largest.segments
    of_kind = {"joint": tokens, "alone": tokens, "images": a + b, "words": tokens - a - b,
               "co_attention": 1.5 * c + 0.2 * b, "connected": b + c}  # fmt: skip
    costs = [block * of_kind[kind_of(model, layer)] for layer in range(model.layers)]
    embedding = 3.0 * 2 * images * model.patches * 3 * model.patch_size**2 * (model.vision_width or d)
    embedding += model.vision_layers * (a + b) * block * (model.vision_width / d) ** 2
    ranks, chunks = config.parallel.pipeline, config.parallel.chunks
    stages = balanced_stages(costs, embedding, last_flops, ranks * chunks)
    return StagePlan(stages, ranks, tokens)


def check_trained_stages(plan: StagePlan, trained: Iterable[str]) -> None:
    """Raises ValueError for a stage with none of the `trained` parameters: nothing would take its gradient."""
    counts = [0] * len(plan.stages)
    for name in trained:
        if block := re.match(r"blocks\.(\d+)\.", name):
            counts[next(n for n, layers in enumerate(plan.stages) if int(block[1]) in layers)] += 1
        else:
            counts[0 if name.startswith(OF_FIRST) else -1] += 1
    for number, (layers, count) in enumerate(zip(plan.stages, counts, strict=True)):
        require(
            count > 0,
            f"train_only leaves nothing to train in stage {number + 1} of {len(counts)} (layers {layers.start} to "
            f"{layers.stop - 1}): use a smaller parallel.pipeline, or name some of its parameters",
        )


def keep_stages(model: BEiT3, stages: Iterable[range], is_first: bool, is_last: bool) -> None:
    """Deletes, on the meta device, what other processes hold. Every parameter keeps its canonical name."""
    kept = {str(layer) for layers in stages for layer in layers}
    for layer in [layer for layer in model.blocks if layer not in kept]:
        del model.blocks[layer]
    for name, _ in list(model.named_children()):
        if name != "blocks" and not (is_first if name in OF_FIRST else is_last):  # norm and heads, whichever there are
            delattr(model, name)


class Stages(nn.Module):
    """This process's stages (chunks) of the model under its objective. All chunks share one DeepSpeed engine, so that
    there is one gradient norm. (*)"""

    def __init__(self, objective: Any, stages: list[range], layers: int, tokens: int) -> None:
        """`stages`: layers of each chunk; `layers`: of the whole model; `tokens`: capacity between stages."""
        super().__init__()
        self.objective = objective
        self._stages, self._layers, self.tokens = stages, layers, tokens
        self._micro_batches: list[tuple[MixedInputs, Any, Tensor]] = []
        self._coming: Iterator[tuple[MixedInputs, Any, Tensor]] = iter(())
        self._step_counts, self._step = torch.ones(objective.columns), 0
        self.statistics = torch.zeros(2, objective.columns)

    def begin(self, micro_batches: Iterable[Any], step_counts: Tensor, step: int) -> None:
        """Takes the micro-batches of a step, which the schedule names by their numbers. Each is prepared when it is
        first asked for: the last stage tokenises its images while the former stages compute."""
        self._micro_batches, self._coming = [], iter(micro_batches)
        self._step_counts, self._step = step_counts, step
        self.statistics = torch.zeros(2, self.objective.columns, dtype=torch.float64, device=step_counts.device)

    def forward(self, x: Tensor, number: int, chunk: int) -> Tensor:
        """x: the previous stage's padded activations [capacity, D]. Returns the same, or the loss [1] on the last."""
        while len(self._micro_batches) <= number:
            self._micro_batches.append(next(self._coming))
        inputs, reading, sample_ids = self._micro_batches[number]
        inputs = self.objective.with_drop_path(inputs, sample_ids, self._step)
        layers, model = self._stages[chunk], self.objective.model
        tokens = sum(inputs.layout.segments)
        x_TD = model.embed(inputs) if layers.start == 0 else x[:tokens]
        is_last = layers.stop == self._layers
        x_TD = model.blocks(x_TD, inputs.layout, inputs.keep, layers, reading.selection if is_last else None)
        if is_last:
            contribution, statistics = self.objective.losses(x_TD, reading, self._step_counts)
            self.statistics += statistics
            return contribution[None]
        return torch.cat([x_TD, x_TD.new_zeros(self.tokens - tokens, x_TD.shape[1])])


class _Chunk(nn.Module):
    """One chunk as torch's pipelining sees it."""

    engine: Any

    def __init__(self, engine: Any, chunk: int) -> None:
        super().__init__()
        object.__setattr__(self, "engine", engine)  # not a submodule
        self.chunk = chunk

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        return self.engine(x, int(number), self.chunk)


class _ZeroStage(PipelineStage):
    """A pipeline stage whose backward goes through its DeepSpeed engine."""

    pipeline: Pipeline

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], None]:
        engine: Any = self.submod.engine
        # (*) The boundary is the last backward of the whole process in this step, not of a chunk.
        engine.set_gradient_accumulation_boundary(self.pipeline.count_backward())
        allow_another_backward(engine)
        output, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        if self.is_last:
            loss = spoil_if_not_finite(output.sum()) * self.pipeline.data_parallel
        else:
            # (*) The scalar whose gradient with respect to the output is the received one: ZeRO-0 takes no other.
            loss = sum((o * g.detach()).sum() for o, g in zip(output, gradients, strict=True))
        engine.backward(loss, scale_wrt_gas=False)
        return tuple(v.grad if isinstance(v, Tensor) else None for v in bwd_kwargs["input_values"]), None


class _LendingStage(_ZeroStage):
    """A stage that receives into as many buffers as micro-batches are under way in it at a time. torch makes two for
    each micro-batch of the step; one as old as 2.10 cannot be told otherwise."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self.buffers = 0
        """Those that were made."""

    def _setup_forward_recv_info(self, num_microbatches: int, *rest: Any) -> None:
        super()._setup_forward_recv_info(1, *rest)
        self.args_recv_info = self._of_all(self.args_recv_info[0], num_microbatches)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        super()._setup_backward_recv_info(1)
        self.chunks = num_microbatches
        self.grad_recv_info = self._of_all(self.grad_recv_info[0], num_microbatches)

    def _of_all(self, first: tuple[Any, ...], micro_batches: int) -> dict[int, tuple[Any, ...]]:
        """What is received of each micro-batch, from that of the first one, without its buffers."""
        for info in first:
            info.buffer = None
        return {number: tuple(map(copy, first)) for number in range(micro_batches)}

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._lend(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._lend(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **keywords: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *arguments, **keywords)
        if not self.has_backward:
            self._take_back(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **keywords: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *arguments, **keywords)
        if self.has_backward:
            self._take_back(self.args_recv_info[bwd_chunk_id])
            self._take_back(self.grad_recv_info.get(bwd_chunk_id, ()))

    def _lend(self, received: tuple[Any, ...]) -> None:
        for info in received:
            if not info.is_root_arg and info.tensor_meta is not None:
                shape, dtype = info.tensor_meta.shape, info.tensor_meta.dtype
                if free := self._free.get((shape, dtype)):
                    info.buffer = free.pop()
                else:
                    info.buffer, self.buffers = torch.empty(shape, dtype=dtype, device=self.device), self.buffers + 1

    def _take_back(self, received: tuple[Any, ...]) -> None:
        """Nothing reads the buffers any more; the gradients of what lay there have memory of their own."""
        for info in received:
            if info.buffer is not None:
                buffer, info.buffer = info.buffer.detach(), None
                self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)


_STAGE = _LendingStage if hasattr(PipelineStage, "_setup_forward_recv_info") else _ZeroStage


def allow_another_backward(engine: Any) -> None:
    """(*) DeepSpeed reduces gradients once per forward. In the cool-down of 1F1B backwards follow one another, and all
    but the first would skip the reduction."""
    if hasattr(engine.optimizer, "clear_backward_seen_flag"):
        engine.optimizer.clear_backward_seen_flag()


class Pipeline:
    """The schedule of one process: feeds micro-batches through its stages."""

    def __init__(self, config: TrainingConfig, groups: Groups, engine: Any, module: Stages) -> None:
        mesh = groups.mesh
        self._engine, self._module, self._groups = engine, module, groups
        self.micro_batches, self.chunks, self.data_parallel = (config.accumulation, config.parallel.chunks, mesh.data)
        self._backwards = 0
        dtype = torch.bfloat16 if config.in_bf16 else torch.float32
        x = torch.zeros(module.tokens, config.model.width, dtype=dtype, device=mesh.device)
        self._nothing = torch.zeros(self.micro_batches, 1, dtype=dtype, device=mesh.device)
        total = mesh.pipeline * self.chunks
        stages: list[Any] = []
        for chunk in range(self.chunks):
            index = chunk * mesh.pipeline + mesh.pipeline_rank
            received = self._nothing[:1] if index == 0 else x.clone().requires_grad_()
            sent = torch.zeros(1, device=mesh.device) if index == total - 1 else x.clone().requires_grad_()
            stage = _STAGE(
                _Chunk(engine, chunk), index, total, mesh.device, received, sent.requires_grad_(), group=groups.pipeline
            )
            stage.pipeline = self
            stages.append(stage)
        options: dict[str, Any] = {
            "n_microbatches": self.micro_batches,
            "loss_fn": lambda loss, _: loss,
            "scale_grads": False,
        }
        self._schedule: Any = (
            Schedule1F1B(stages[0], **options) if self.chunks == 1 else ScheduleInterleaved1F1B(stages, **options)
        )
        self._begin_trace = _trace_whole_steps(engine)

    def train(self, micro_batches: Iterable[Any], step_counts: Tensor, step: int) -> Tensor:
        """Forward and backward of a step's micro-batches; statistics [2, K] of the last stage, zeros elsewhere."""
        self._backwards = 0
        return self._run(self._schedule.step, micro_batches, step_counts, step)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Any]) -> Tensor:
        no_loss = torch.ones(self._module.objective.columns, device=self._nothing.device)
        return self._run(self._schedule.eval, micro_batches, no_loss, 0)

    def _run(self, run: Any, micro_batches: Iterable[Any], step_counts: Tensor, step: int) -> Tensor:
        mesh = self._groups.mesh
        self._begin_trace()
        self._module.begin(micro_batches, step_counts, step)
        arguments = (self._nothing,) if mesh.pipeline_rank == 0 else ()
        keywords: dict[str, Any] = {"number": torch.arange(self.micro_batches)}
        if mesh.is_last_stage:
            keywords |= {"target": self._nothing, "losses": []}
        run(*arguments, **keywords)
        return self._module.statistics

    def count_backward(self) -> bool:
        """Counts a backward of this process; whether it is the step's last one."""
        self._backwards += 1
        return self._backwards == self.micro_batches * self.chunks

    def after_step(self) -> None:
        """(*) The chunks that do not go backward first in a step would accumulate onto the last step's gradients."""
        zero_gradients(self._engine)


def _trace_whole_steps(engine: Any) -> Callable[[], None]:
    """(*) ZeRO-3 records in which order modules run, to gather each one's parameters while those before it compute, and
    begins anew with every forward pass of the engine. The passes of a stage alternate in one way at the begin of a step
    and in another at its end, so that it would forget the order in every step. Returns what begins instead: to call
    before each step, and before a validation, which has an order of its own."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return lambda: None
    coordinator = offload.get_param_coordinator()
    begin: Callable[[], None] = coordinator.reset_step
    coordinator.reset_step = lambda: None
    return begin


def zero_gradients(engine: Any) -> None:
    """Of ZeRO-3, which overwrites its gradient buffer only where a step's first backward pass has a gradient."""
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()


def check_order_within(data: dist.ProcessGroup) -> None:
    """(*) ZeRO-3 asserts that all processes of the world run the same modules, which stages do not; compare within the
    replicas of a stage instead, with one small all-reduce in place of pickling."""

    def same_within_data(values: Any) -> None:
        digest = int.from_bytes(hashlib.sha256(repr(list(values)).encode()).digest()[:7], "big")
        low_high = torch.tensor([digest, -digest])
        if dist.get_backend(data) == "nccl":
            low_high = low_high.cuda()
        dist.all_reduce(low_high, op=dist.ReduceOp.MIN, group=data)
        if low_high[0] != -low_high[1]:
            raise RuntimeError("the replicas of a stage run their modules in different orders")

    coordinator: Any = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    coordinator.assert_ints_same_as_other_ranks = same_within_data
