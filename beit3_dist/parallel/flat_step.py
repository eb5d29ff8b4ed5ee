"""DeepSpeed's optimizers without their loops over parameters.

Between backward pass and AdamW, DeepSpeed 0.19 visits every parameter with small operations: fp32 sums of gradients,
copies, norms, tests for infinities. With a thousand parameters these are thousands of kernel launches, and the device
waits for them. `flatten_step` gives the optimizer of a DeepSpeed engine a subclass of its own class that does the same
with one operation for a list of tensors (torch._foreach_*) or for a whole flat buffer, and that waits for the device
once, where it reads the gradient norm.

    ZeRO-1 in bf16          `FlatBF16`     sums, reduction, norm, clipping; the reduction runs beside the backward pass
    ZeRO-1 in fp32, ZeRO-2  `FlatStage12`  sums of what was reduced, norm; at ZeRO-1 what is reduced when
    ZeRO-3                  `FlatStage3`   sums of what was reduced, norm; the flat buffer is the optimizer's gradient

Losses, norms and weights are DeepSpeed's bit for bit (tests/parallel/test_flat_step.py), but for what follows:
- ZeRO-1 in bf16 on one replica: sums of several micro-batches stay in fp32. DeepSpeed rounds them to bf16, the type of
  the reduction, although there is nobody to send them to.
- ZeRO-1 in bf16 on more than two replicas: each bucket is reduced where it lies in the flat gradient, so the replicas'
  gradients may be summed in another order.
- ZeRO-1 in fp32 with `overlap_comm` on interleaved stages, where DeepSpeed's own loses gradients.
- On a GPU the norm of a tensor is summed in another order by torch._foreach_norm.
- ZeRO-1 in bf16 with an AdamW of one kernel (kernels/adamw: `kernels=triton`): its roundings in fp32 are not those of
  torch's fused AdamW. It clips on its way and writes the working parameters too; and where there is one replica and one
  micro-batch, so that there is nothing to sum up, it reads the bf16 gradients where autograd has left them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import get_norm_dtype
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

from beit3_dist.kernels.adamw.definition import Flat, Update
from beit3_dist.kernels.registry import Function
from beit3_dist.optimizers.adamw import MOMENTS
from beit3_dist.parallel.reduction import InOrder

WRITTEN_FOR = "0.19."
"""Versions of DeepSpeed whose optimizers are the ones below."""


def flatten_step(engine: Any, adamw: Function | None = None) -> None:
    """Takes the loops over parameters out of the optimizer of a DeepSpeed engine, at ZeRO 1 to 3. `adamw`: what
    computes this operation at ZeRO-1 in bf16; None: torch's.

    Raises RuntimeError where DeepSpeed is another one than this module was written for.
    """
    for flat in (FlatBF16, FlatStage12, FlatStage3):
        if type(engine.optimizer) is flat.__base__:
            check_written_for(flat)
            engine.optimizer.__class__ = flat
            engine.optimizer.take_over(engine, adamw)


def check_written_for(flat: Any) -> None:
    """Raises RuntimeError where `flat` replaces methods that its base class does not have, or has otherwise."""
    base = flat.__base__
    advice = f"install deepspeed {WRITTEN_FOR}*, or read its new code and adapt beit3_dist/parallel/flat_step.py"
    if not deepspeed.__version__.startswith(WRITTEN_FOR):
        raise RuntimeError(f"deepspeed {deepspeed.__version__} was not tried: {advice}")
    for name, method in vars(flat).items():
        if not inspect.isfunction(method) or name in flat.additions:
            continue
        theirs = _undecorated(getattr(base, name, None))
        if theirs is None or [*inspect.signature(theirs).parameters] != [*inspect.signature(method).parameters]:
            raise RuntimeError(f"{base.__name__}.{name} of deepspeed {deepspeed.__version__} has changed: {advice}")


def _undecorated(function: Any) -> Any:
    """DeepSpeed's decorator for profilers hides the signature of what it wraps."""
    if getattr(function, "__name__", "") == "wrapped_fn":
        return next(c.cell_contents for c in function.__closure__ if inspect.isfunction(c.cell_contents))
    return function


def sum_of_squares(tensors: list[Tensor], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Sum over the tensors' squared norms, each computed in `dtype`; a scalar of this type. A rank may have none."""
    if not tensors:
        return torch.zeros((), dtype=dtype, device=device)
    return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype)).pow(2.0).sum()


def squares_of_model(gradients: Iterable[tuple[Tensor, Any]], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """What this rank adds to the squared norm of the whole model's gradient: that of its (gradient, parameter)s which
    count here (`mark_model_parallel`). A copy that counts on another tensor rank adds 0, or NaN where it is not finite:
    a device may have spoilt this one alone."""
    counted, copies = list[Tensor](), list[Tensor]()
    for gradient, parameter in gradients:
        (counted if is_model_parallel_parameter(parameter) else copies).append(gradient)
    squares = sum_of_squares(counted, dtype, device)
    return squares + 0 * sum_of_squares(copies, dtype, device) if copies else squares


Change = Callable[[list[Tensor]], None]
"""Writes to gradients in place."""


def add_pieces(sums: list[Tensor], pieces: list[Tensor]) -> None:
    """sums[i] += pieces[i], for fp32 sums and pieces of one type: torch._foreach_add_ itself visits tensors of mixed
    types one by one."""
    if pieces[0].dtype != sums[0].dtype:
        flat = torch.empty(sum(piece.numel() for piece in pieces), dtype=sums[0].dtype, device=sums[0].device)
        converted = list(_unflatten_dense_tensors(flat, pieces))
        torch._foreach_copy_(converted, pieces)
        pieces = converted
    torch._foreach_add_(sums, pieces)


@dataclass
class Bucket:
    """Neighbours in the flat gradient of a parameter group, which are summed up and sent together."""

    group: int
    first: int
    """Index of its first parameter in the group."""
    parameters: list[nn.Parameter]
    flat: Tensor
    """Their fp32 sums: a part of the group's flat gradient."""
    sums: Sequence[Tensor] = field(init=False)
    """The same, shaped as the parameters."""
    waiting: int = field(init=False)
    """Parameters whose last gradient of the step is still to come."""

    def __post_init__(self) -> None:
        self.sums = _unflatten_dense_tensors(self.flat, self.parameters)
        self.waiting = len(self.parameters)


class FlatBF16(BF16_Optimizer):
    """ZeRO-1 in bf16 with fp32 sums.

    The first gradient of a step is copied to its sum, so that the sums need no zeros, and each bf16 gradient is
    released at once, so that autograd hands over the next one instead of adding it. Where `overlap_comm` is set, a
    bucket is reduced as soon as the last backward pass of a step has made its gradients, in one order on all ranks.
    """

    additions = (
        "take_over", "change_gradients", "reduce_gradients", "_buckets_of", "_arrived", "_sum_up", "_send", "_norm",
        "_step_at_once",
    )  # fmt: skip

    def take_over(self, engine: Any, adamw: Function | None = None) -> None:
        """Continues with what BF16_Optimizer has set up."""
        self._engine = engine
        self._adamw = adamw if type(self.optimizer) is torch.optim.AdamW else None
        self._summed = True
        self._replicas = dist.get_world_size(self.dp_process_group)
        size = engine.zero_reduce_bucket_size()
        buckets = [bucket for group in range(len(self.bf16_groups)) for bucket in self._buckets_of(group, size)]
        order = {parameter: number for number, parameter in enumerate(self.param_names)}
        # Backward reaches a bucket's first parameter last.
        self._buckets = sorted(buckets, key=lambda b: min(order[p] for p in b.parameters), reverse=True)
        self._sent = 0
        self._stream = None
        if self._replicas > 1 and engine.zero_overlap_comm():
            self._stream = torch.cuda.Stream() if self._buckets[0].flat.is_cuda else None
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))

    def _buckets_of(self, group: int, size: int) -> list[Bucket]:
        """Buckets of at most `size` elements, or of one larger parameter."""
        parameters, gradient = self.bf16_groups[group], self.fp32_groups_gradients_flat[group]
        buckets: list[Bucket] = []
        first = start = end = 0
        for number, parameter in enumerate([*parameters, None]):
            if parameter is None or (end > start and end - start + parameter.numel() > size):
                buckets.append(Bucket(group, first, parameters[first:number], gradient[start:end]))
                first, start = number, end
            end += parameter.numel() if parameter is not None else 0
        return buckets

    @torch.no_grad()
    def _arrived(self, bucket: Bucket, _: Tensor) -> None:
        """A gradient is complete: sends the buckets that are, of those whose turn it is."""
        if not self.is_gradient_accumulation_boundary():
            return
        bucket.waiting -= 1
        while self._sent < len(self._buckets) and self._buckets[self._sent].waiting == 0:
            self._sum_up(self._buckets[self._sent])
            self._send(self._buckets[self._sent])
            self._sent += 1

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """After a backward pass: adds its gradients to their sums, if there is anything to add."""
        only_one = self.is_gradient_accumulation_boundary() and not any(map(any, self.fp32_groups_has_gradients))
        self._summed = self._adamw is None or self._replicas > 1 or not only_one
        if not self._summed:
            return
        for bucket in self._buckets[self._sent :]:
            self._sum_up(bucket)

    def _sum_up(self, bucket: Bucket) -> None:
        """Moves the bucket's bf16 gradients to their sums."""
        has_sum = self.fp32_groups_has_gradients[bucket.group]
        first: list[int] = []
        later: list[int] = []
        for number, parameter in enumerate(bucket.parameters):
            if parameter.grad is not None:
                (later if has_sum[bucket.first + number] else first).append(number)
        gradients: list[Any] = [parameter.grad for parameter in bucket.parameters]
        if later:
            # Through one flat copy, not fp32: an addition of mixed types is exact, but not one for lists of tensors.
            make = torch.empty if len(later) == len(gradients) else torch.zeros
            flat = make(bucket.flat.numel(), dtype=gradients[later[0]].dtype, device=bucket.flat.device)
            places = _unflatten_dense_tensors(flat, bucket.parameters)
            torch._foreach_copy_([places[i] for i in later], [gradients[i] for i in later])
            bucket.flat.add_(flat)
        if first:
            torch._foreach_copy_([bucket.sums[i] for i in first], [gradients[i] for i in first])
        for number in (*first, *later):
            has_sum[bucket.first + number] = True
            bucket.parameters[number].grad = None

    def _send(self, bucket: Bucket) -> None:
        """Averages the bucket's sums over the replicas, by DeepSpeed's own arithmetic, in place."""
        if self._stream is None:
            self._engine.allreduce_bucket([bucket.flat], self.dp_process_group)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._engine.allreduce_bucket([bucket.flat], self.dp_process_group)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """After the last backward pass of a step. DeepSpeed's engine calls it where an optimizer has it."""
        for parameter in (p for bucket in self._buckets[: self._sent] for p in bucket.parameters):
            if parameter.grad is not None:
                raise RuntimeError(f"a gradient of {self.param_names[parameter]} came after its sum had been sent")
        if self._replicas > 1:
            for bucket in self._buckets[self._sent :]:
                self._send(bucket)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._sent = 0
        for bucket in self._buckets:
            bucket.waiting = len(bucket.parameters)

    def change_gradients(self, parameters: Collection[nn.Parameter], change: Change) -> None:
        """Has what the step is about to take of the gradients of some parameters changed. After the reduction."""
        if self._summed:
            rows = zip(self.bf16_groups, self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True)
            change([
                total
                for group, sums, has_sum in rows
                for parameter, total, has in zip(group, sums, has_sum, strict=True)
                if has and parameter in parameters
            ])  # fmt: skip
        else:
            change([parameter.grad for parameter in parameters if parameter.grad is not None])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clips, steps and gathers the working parameters; leaves all of it out where the norm is not finite."""
        done = []
        if self._adamw is not None:
            states = [self.optimizer.state[master] for master in self.fp32_groups_flat_partition]
            done = [state["step"] for state in states if "step" in state]
        norm, *steps = torch.stack([self._norm(), *done]).cpu()  # the step's one wait for the device
        self.overflow = not norm.isfinite()
        self._global_grad_norm = float("inf") if self.overflow else norm.item()
        if self.overflow:
            self.zero_grad()
            return
        factor = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0) if self.clip_grad > 0 else torch.ones(())
        if self._adamw is not None and not self._summed:
            gradients = [[parameter.grad for parameter in group] for group in self.bf16_groups]
            self._step_at_once(self._adamw, gradients, factor, steps)
            self.clear_lp_grads(set_to_none=True)
            return
        without = [
            sums[number]
            for sums, has_sum in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True)
            for number, has in enumerate(has_sum)
            if not has
        ]
        if without:
            torch._foreach_zero_(without)
        sums = self.fp32_groups_gradient_flat_partition
        if self._adamw is not None:
            self._step_at_once(self._adamw, [[gradient] for gradient in sums], factor, steps)
            self.clear_hp_grads()
            return
        for master, gradient in zip(self.fp32_groups_flat_partition, sums, strict=True):
            if factor < 1:
                gradient.mul_(factor)
            master.grad = gradient
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()
        self.clear_hp_grads()

    def _step_at_once(
        self, adamw: Function, gradients: list[list[Tensor | None]], factor: Tensor, steps: list[Tensor]
    ) -> None:
        """AdamW with the gradients of each group, which together are its partition; `steps`: those taken before."""
        for number, group in enumerate(self.optimizer.param_groups):
            master = self.fp32_groups_flat_partition[number]
            state = self.optimizer.state[master]
            if not state:
                state["step"] = torch.zeros((), device=master.device)
                state.update({moment: torch.zeros_like(master) for moment in MOMENTS})
            state["step"] += 1
            weights = self.bf16_partitioned_groups[number][dist.get_rank(self.real_dp_process_group[number])]
            beta1, beta2 = group["betas"]
            update = Update(
                factor=factor.item(), lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
                weight_decay=group["weight_decay"], steps=int(steps[number]) + 1 if steps else 1,
            )  # fmt: skip
            first, second = (state[moment] for moment in MOMENTS)
            sizes = [p.numel() for p in self.bf16_groups[number]] if not self._summed else [master.numel()]
            adamw(Flat(master, first, second, weights), gradients[number], sizes, update)
        self._lazy_init_hp_params_optimizer_state()
        all_gather_dp_groups(
            groups_flat=self.bf16_groups_flat,
            partitioned_param_groups=self.bf16_partitioned_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )

    def _norm(self) -> Tensor:
        """Norm of the gradient of the whole model; a scalar."""
        parameters = [parameter for group in self.bf16_groups for parameter in group]
        if self._summed:
            sums = [gradient for group in self.fp32_groups_gradients for gradient in group]
            there = [has for group in self.fp32_groups_has_gradients for has in group]
            gradients = [(g, p) for g, p, has in zip(sums, parameters, there, strict=True) if has]
        else:
            gradients = [(p.grad, p) for p in parameters if p.grad is not None]
        squares = squares_of_model(gradients, torch.float32, self._buckets[0].flat.device)
        dist.all_reduce(squares, group=self.mpu.get_model_parallel_group())
        return squares.pow(0.5)

    def clear_hp_grads(self) -> None:
        """The next gradients overwrite their sums."""
        self.fp32_groups_has_gradients = [[False] * len(group) for group in self.bf16_groups]


class FlatStage12(DeepSpeedZeroOptimizer):
    """ZeRO-1 in fp32 and ZeRO-2.

    Where `overlap_comm` is set, DeepSpeed's ZeRO-1 sends what the last backward pass of a step reaches, and nothing
    else: where stages are interleaved, the other stages' gradients would stay those of a rank's own samples. Here the
    rest follows when that pass is over, and all is sent in one order on all ranks.
    """

    additions = ("take_over", "change_gradients", "_send")
    _in_order: InOrder | None

    def take_over(self, engine: Any, adamw: Function | None = None) -> None:
        """Continues with what DeepSpeedZeroOptimizer has set up."""
        self._group_of = {p: number for number, group in enumerate(self.bit16_groups) for p in group}
        self._in_order = None
        if self.overlap_comm and not self.partition_gradients:
            self._in_order = InOrder([p for p in self.param_names if p in self._group_of], self._send)

    def reduce_ready_partitions_and_remove_grads(self, param: Any, i: int) -> None:
        """A gradient is complete: at ZeRO-1 it is sent when it is its turn."""
        if self._in_order is None:
            super().reduce_ready_partitions_and_remove_grads(param, i)
        elif self.is_gradient_accumulation_boundary():
            self._in_order.arrive(param)

    def _send(self, parameter: Any) -> None:
        """Puts a gradient into DeepSpeed's bucket, which is sent when it is full."""
        if parameter.grad is not None:
            self.reduce_independent_p_g_buckets_and_remove_grads(parameter, self._group_of[parameter])

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """After the last backward pass of a step, at ZeRO-1."""
        if self._in_order is not None:
            self._in_order.end()
        super().reduce_gradients(pipeline_parallel)

    def change_gradients(self, parameters: Collection[nn.Parameter], change: Change) -> None:
        """As `FlatBF16.change_gradients`, of this rank's parts."""
        if not self.cpu_offload:
            groups = ((_pieces(self.averaged_gradients[i]), own) for i, own in enumerate(self.params_in_partition))
            change([g for pieces, own in groups for g, p in zip(pieces, own, strict=False) if p in parameters])
            return
        self._wait_for_offload_copies()
        parts = {}
        for parameter in (p for own in self.params_in_partition for p in own if p in parameters):
            number = self.get_param_id(parameter)
            group, _, start, count = self.grad_position[number]
            parts[number] = self.single_partition_of_fp32_groups[group].grad.view(-1).narrow(0, start, count)
        change([*parts.values()])
        for number, part in parts.items():  # whose norms were taken on the device
            self.norm_for_param_grads[number] = part.to(get_norm_dtype()).norm(2)

    def allreduce_and_copy_with_multiple_ranks(
        self,
        small_bucket: list[Tensor],
        communication_data_type: torch.dtype,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
        bucket_ranks: Any = None,
        output_bucket: Any = None,
    ) -> None:
        """Reduces a bucket and adds what belongs to this rank to its flat fp32 gradient."""
        rank = dist.get_rank(process_group)
        mine = [rank in ranks for ranks in bucket_ranks]
        outputs = [output for output, is_mine in zip(output_bucket or [None] * len(mine), mine, strict=True) if is_mine]
        if any(output is None for output in outputs):  # not in bf16: the gradients themselves are reduced
            super().allreduce_and_copy_with_multiple_ranks(
                small_bucket, communication_data_type, log, divide, process_group, bucket_ranks, output_bucket
            )
            return
        reduced = self.allreduce_bucket(
            small_bucket, communication_data_type, log=log, divide=divide, process_group=process_group
        )
        if self.overlap_comm and reduced.is_cuda:
            reduced.record_stream(self.reduction_stream)
        if outputs:
            pieces = _unflatten_dense_tensors(reduced, small_bucket)
            add_pieces(outputs, [piece for piece, is_mine in zip(pieces, mine, strict=True) if is_mine])

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """A gradient that is not finite has a norm that is not, which DeepSpeed looks at next."""
        if self.cpu_offload or not self.compute_grad_norm:
            super().check_overflow(partition_gradients)

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: int = 2) -> Tensor:
        """Norm of a parameter group's gradient over all ranks, -1 where it is not finite; a scalar."""
        whose = zip(_pieces(gradients), params, strict=False)
        total = squares_of_model(whose, get_norm_dtype(), self.device).float()
        dist.all_reduce(total, group=self.dp_process_group)
        self._model_parallel_all_reduce(total, dist.ReduceOp.SUM)
        norm = total.pow(0.5)
        return norm.masked_fill(~norm.isfinite(), -1.0)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """On the host, so that the step waits for the device only here."""
        return super().scaled_global_norm(norm_type).cpu()


def _pieces(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Those of a partition's gradients that are parameters', in their order; what comes behind them may be padding that
    carries no mark."""
    return [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]


class FlatStage3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO-3."""

    gradient_accumulation_dtype: torch.dtype
    additions = ("take_over", "change_gradients")

    def take_over(self, engine: Any, adamw: Function | None = None) -> None:
        """Nothing to prepare."""

    def change_gradients(self, parameters: Collection[Any], change: Change) -> None:
        """As `FlatBF16.change_gradients`, of this rank's parts."""
        if not self.offload_optimizer:
            place = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            change([place[parameter.ds_id] for parameter in parameters])
            return
        parts = {}
        for number in map(self.get_param_id, parameters):
            group, start, count = self.grad_position[number]
            parts[number] = self.fp32_partitioned_groups_flat[group].grad.narrow(0, start, count)
        change([*parts.values()])
        for number, part in parts.items():  # whose norms were taken on the device
            self.norm_for_param_grads[number] = self._constant_buffered_norm2(part)

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """This rank's pieces of the gradients, as they were sent: `partition_grads` converts them all at once."""
        dtype: torch.dtype = self.gradient_accumulation_dtype
        self.gradient_accumulation_dtype = communication_data_type
        try:
            return super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(params_to_reduce, communication_data_type)
        finally:
            self.gradient_accumulation_dtype = dtype

    @torch.no_grad()
    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> Any:
        """Adds pieces of gradients to this rank's flat gradient and releases the gradients."""
        if self.offload_optimizer:
            return super().partition_grads(params_to_release, grad_partitions)
        sums, pieces = [], []
        for parameter, piece in zip(params_to_release, grad_partitions, strict=True):
            if piece.numel():  # a rank behind the end of a small parameter holds nothing of it
                place = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[parameter.ds_id]
                sums.append(place.narrow(0, 0, piece.numel()))
                pieces.append(piece)
            if parameter.grad.is_cuda:
                parameter.grad.record_stream(torch.cuda.current_stream())
            parameter.grad = None
        if pieces and self.micro_step_id == 0:
            torch._foreach_copy_(sums, pieces)
        elif pieces:
            add_pieces(sums, pieces)
        return sums

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: int = 2) -> Tensor:
        """Norm of a parameter group's gradient over all ranks, -1 where it is not finite; a scalar."""
        whose = zip(gradients, params, strict=True)
        total = squares_of_model(whose, get_norm_dtype(), self.device)
        dist.all_reduce(total, group=self._get_param_partition_group(params[0]))
        self._model_parallel_all_reduce(total, dist.ReduceOp.SUM)
        norm = total.pow(0.5)
        return norm.masked_fill(~norm.isfinite(), -1.0)

    def _get_norm_groups(self) -> list[Tensor]:
        """On the host, so that the step waits for the device only here."""
        return [*torch.stack(super()._get_norm_groups()).cpu()]

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """The pieces of a sub-group lie side by side, in its order: no copy is needed."""
        pieces, master = self.averaged_gradients[sub_group_id], self.fp32_partitioned_groups_flat[sub_group_id]
        master.grad = self.grad_partitions_flat_buffer.narrow(0, pieces[0].storage_offset(), master.numel())
        self.averaged_gradients[sub_group_id] = None
