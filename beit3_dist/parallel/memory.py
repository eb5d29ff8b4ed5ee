"""Bytes of training states that each rank holds, from arithmetic alone: before a machine is paid for.

Activations are not counted. With P parameters on the rank (its tensor part of its pipeline stages) and d replicas,
DeepSpeed 0.19.8 holds these bytes when the gradients of a step are complete:

                        working parameters   gradients   masters   AdamW's moments
    bf16  ZeRO-1        2 P                  6 P         4 P / d   8 P / d
          ZeRO-2        2 P                  4 P / d     4 P / d   8 P / d
          ZeRO-3        2 P / d              4 P / d     4 P / d   8 P / d             = 18 P / d
    fp32  ZeRO-0        4 P                  4 P         -         8 P
          ZeRO-1        4 P                  4 P         4 P / d   8 P / d
          ZeRO-2        4 P                  4 P / d     4 P / d   8 P / d
          ZeRO-3        4 P / d              4 P / d     4 P / d   8 P / d             = 20 P / d

bf16 gradients are accumulated in fp32. ZeRO-1 in bf16 shards no gradients (`flat_step.FlatBF16`): at the end of a
backward pass the bf16 ones, 2 P, lie beside their fp32 sums, then they go; where `overlap_comm` is set, the last
backward pass of a step releases them bucket by bucket. ZeRO 1 to 3 in fp32 hold every sharded weight twice,
as parameter and as master. tests/parallel/test_memory.py counts the same in real tensors. Of what is frozen
(`train_only`) there are the working parameters alone; the fp32 values that checkpoints take lie on the host. Another
optimizer has other moments, 4 bytes an element each (optimizers/), and a moving average of the weights 4 P / d more
(4 P at ZeRO-0). In its step Lion holds a direction, Muon and LAMB one or two, 4 P / d each, when activations are gone.

Beside these, the buffers of the reduction: reduce_bucket_size elements (two such for ZeRO-2 and ZeRO-1 in fp32 where
`overlap_comm` is set). Without it ZeRO-0 leaves the reduction to the engine, which joins gradients up to 5e8
elements. Under ZeRO-3 the gathered parameters, at most
min(stage3_max_live_parameters, P). The optimizer step of ZeRO-1 and ZeRO-2 in fp32 copies gradients for a moment, at
most 4 P / d more, when activations are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any

from beit3_dist.config import RunConfig, require
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.cut import cut_for, cuts_of
from beit3_dist.model.token_layout import TokenLayout
from beit3_dist.optimizers.registry import chosen
from beit3_dist.parallel.deepspeed_config import DEFAULT_BUCKET, deepspeed_config
from beit3_dist.parallel.pipeline import check_pipeline, keep_stages, plan_stages
from beit3_dist.parallel.tensor import check_tensor

ENGINE_BUCKET = 500_000_000
"""Elements that DeepSpeed's engine joins where it reduces gradients itself."""
DEFAULT_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters, and of stage3_max_reuse_distance."""


@dataclass(frozen=True)
class StateBytes:
    """What every replica of one tensor rank's part of one pipeline rank's stages holds."""

    pipeline_rank: int
    tensor_rank: int
    parameters: int
    """P: parameters of the part, a number, not bytes."""
    trained: int
    """So many of them are trained."""
    working: float
    gradients: float
    masters: float
    moments: float
    average: float
    """Moving averages of the weights."""
    products: float
    """FLOPs of matrix products in the optimizer's step."""
    bucket: float
    """Reduce buffers; below ZeRO-3 only during the backward pass."""
    live: float
    """Largest size of the gathered parameters under ZeRO-3."""
    reuse_distance: float
    """Under ZeRO-3 a module's weights stay where they are used again before so many elements of others have been."""

    @property
    def states(self) -> float:
        return self.working + self.gradients + self.masters + self.moments + self.average

    @property
    def total(self) -> float:
        return self.states + self.bucket + self.live


def state_bytes(
    config: RunConfig,
    world: int,
    model: BEiT3,
    largest: Callable[[int], tuple[TokenLayout, float]],
    averages: int = 0,
) -> list[StateBytes]:
    """A record for each (pipeline rank, tensor rank) of `world` processes, pipeline ranks outermost.

    model: the whole model on the meta device. largest: number of replicas -> what `plan_stages` takes. averages: moving
    averages of the weights that the run keeps.
    Raises ValueError where the layout does not divide the model, the batch or the processes, and where the DeepSpeed
    file moves states to the CPU: what then stays on the device is not known from arithmetic.
    """
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline
    require(
        world % ranks == 0,
        f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} does not divide {world} processes",
    )
    check_tensor(config.model, parallel.tensor)
    check_pipeline(config)
    data = world // ranks
    zero = deepspeed_config(config, data)["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        require(section not in zero, f"deepspeed_config: {section} moves states to the CPU, which is not counted")
    plan = plan_stages(config, *largest(data))
    records = []
    for pipeline_rank in range(parallel.pipeline):
        mine = [range(config.model.layers)] if plan is None else plan.of(pipeline_rank)
        for tensor_rank in range(parallel.tensor):
            part = _local_parameters(config, model, mine, pipeline_rank, tensor_rank)
            records.append(_record(config, data, zero, part, averages, pipeline_rank, tensor_rank))
    return records


@dataclass
class _Part:
    """What one tensor rank has of one pipeline rank's stages."""

    parameters: int = 0
    trained: int = 0
    moments: int = 0
    """Elements of the optimizer's state."""
    products: float = 0.0
    """FLOPs of matrix products in its step."""


def _local_parameters(
    config: RunConfig, model: BEiT3, stages: list[range], pipeline_rank: int, tensor_rank: int
) -> _Part:
    parallel, optimizer = config.parallel, chosen(config.optim)
    part = copy(model)  # pruned below; the modules themselves are shared
    part._modules = dict(model._modules)
    part.blocks = copy(model.blocks)
    part.blocks._modules = dict(model.blocks._modules)
    keep_stages(part, stages, is_first=pipeline_rank == 0, is_last=pipeline_rank == parallel.pipeline - 1)
    cuts, found = cuts_of(model), _Part()
    for name, parameter in part.named_parameters():
        shape = tuple(parameter.shape)
        cut = cut_for(cuts, name, tensor_rank, parallel.tensor)
        number = prod(shape if cut is None else cut.shape(shape))
        found.parameters += number
        if parameter.requires_grad:
            found.trained += number
            found.moments += number * len(optimizer.moments(name, shape))
            found.products += optimizer.products(name, shape)
    return found


def _record(
    config: RunConfig,
    data: int,
    zero: dict[str, Any],
    part: _Part,
    averages: int,
    pipeline_rank: int,
    tensor_rank: int,
) -> StateBytes:
    """The formulas of the module's docstring."""
    stage, bf16 = config.parallel.zero_stage, config.in_bf16
    count, trained, holders = part.parameters, part.trained, data if stage else 1
    size, sharded = 2 if bf16 else 4, trained / data
    if stage == 0 and not zero.get("overlap_comm"):
        bucket = 4 * min(ENGINE_BUCKET, trained)
    else:
        buffers = 2 if stage in (1, 2) and zero.get("overlap_comm") and not (stage == 1 and bf16) else 1
        bucket = size * buffers * zero.get("reduce_bucket_size", min(DEFAULT_BUCKET, trained))
    return StateBytes(
        pipeline_rank=pipeline_rank,
        tensor_rank=tensor_rank,
        parameters=count,
        trained=trained,
        working=size * (count / data if stage == 3 else count),
        gradients=4 * sharded if stage >= 2 else (6 if bf16 else 4) * trained,
        masters=4 * sharded if stage else 0,
        moments=4 * part.moments / holders,
        average=4 * averages * trained / holders,
        products=part.products / holders,
        bucket=bucket,
        live=size * min(zero.get("stage3_max_live_parameters", DEFAULT_LIVE_PARAMETERS), count) * (stage == 3),
        reuse_distance=zero.get("stage3_max_reuse_distance", DEFAULT_LIVE_PARAMETERS),
    )
