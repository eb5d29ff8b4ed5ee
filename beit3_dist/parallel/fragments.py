"""Where this rank's shard of every parameter lives in DeepSpeed: fp32 master weights and Adam's moments.

ZeRO flattens the parameters and gives each data-parallel rank some elements of each. A `Fragment`, as DeepSpeed calls
it, is where these lie: in its flat buffers, and in the parameter, whose canonical name it has. So a checkpoint, which
makes shards of them, needs to know neither the ZeRO stage nor the number of ranks. These few functions are the only
ones that look inside DeepSpeed's optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
KEPT = "kept_share"
"""Attribute of a frozen parameter at ZeRO 1 to 3, (first element, fp32 values [n]): this replica's share of it on the
host. DeepSpeed keeps no master of such a one, and its working weights may be rounded."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, held by this rank."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor
    """The tensor that the optimizer steps on; the fragment is a slice of it."""
    offset: int
    """Where the fragment begins in `flat`."""
    numel: int
    trained: bool = True
    """Whether the optimizer steps on it; what is frozen has no moments."""

    def slice_of(self, flat: Tensor) -> Tensor:
        """The fragment's elements of a tensor shaped like `flat`: a view, 1-D."""
        return flat.view(-1).narrow(0, self.offset, self.numel)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed's wrapper steps."""
    return getattr(optimizer, "optimizer", optimizer)


def fragments(model: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    """This rank's fragments in the model's order. `optimizer`: the DeepSpeed engine's."""
    # ZeRO-1 in bf16 with fp32 accumulation is another class of DeepSpeed's than ZeRO-1 in fp32 and ZeRO-2.
    masters: Any = getattr(optimizer, "single_partition_of_fp32_groups", None)
    masters = masters or getattr(optimizer, "fp32_groups_flat_partition", None)
    parameters: Iterable[tuple[str, Any]] = model.named_parameters()  # DeepSpeed adds attributes to them
    for name, parameter in parameters:
        if hasattr(parameter, KEPT):
            start, values = getattr(parameter, KEPT)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            yield Fragment(name, shape, start, values, 0, values.numel(), trained=False)
        elif hasattr(parameter, "ds_id"):  # ZeRO-3
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            held = parameter.ds_tensor.numel()  # padded so that all ranks hold as much
            start = held * dist.get_rank(parameter.ds_process_group)
            numel = max(0, min(held, parameter.ds_numel - start))
            yield Fragment(
                name, tuple(parameter.ds_shape), start, optimizer.fp32_partitioned_groups_flat[group], offset, numel
            )
        elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2; None where this rank holds nothing of the parameter
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat = masters[mapping.param_group_index]
                yield Fragment(
                    name,
                    tuple(parameter.shape),
                    mapping.lp_fragment_address.start,
                    flat,
                    mapping.hp_fragment_address.start,
                    mapping.hp_fragment_address.numel,
                )
        else:  # ZeRO-0 in fp32: the parameter is its own master, and every rank holds all of it
            yield Fragment(
                name, tuple(parameter.shape), 0, parameter, 0, parameter.numel(), trained=parameter.requires_grad
            )


def share_of(value: Tensor, rank: int, ranks: int) -> tuple[int, Tensor]:
    """The first of the elements of a parameter that one of several replicas keeps where it is frozen, and a copy of
    them, fp32 [n] on the host: as many as ZeRO-3 gives each."""
    size = -(-value.numel() // ranks)
    start = min(rank * size, value.numel())
    return start, value.detach().flatten()[start : start + size].to("cpu", torch.float32, copy=True)


def optimizer_state(optimizer: Any, fragment: Fragment) -> dict[str, Tensor]:
    """The moments of a fragment: views into the state, which must exist; none of one that is frozen."""
    if not fragment.trained:
        return {}
    state = inner_optimizer(optimizer).state[fragment.flat]
    return {key: fragment.slice_of(state[key]) for key in MOMENTS}


def create_optimizer_state(optimizer: Any, held: list[Fragment], steps: int) -> None:
    """Gives an optimizer that has not stepped yet the state of one that has taken `steps` steps, its moments zero."""
    inner = inner_optimizer(optimizer)
    for fragment in (one for one in held if one.trained):
        state = inner.state[fragment.flat]
        if MOMENTS[0] in state:
            continue
        state.update({key: torch.zeros_like(fragment.flat, dtype=torch.float32) for key in MOMENTS})
        if isinstance(inner, torch.optim.AdamW):
            on_device = inner.defaults.get("fused")
            state["step"] = torch.tensor(float(steps), device=fragment.flat.device if on_device else "cpu")
        else:  # DeepSpeed's CPU Adam
            state["step"] = steps


@torch.no_grad()
def refresh_parameters(model: nn.Module, optimizer: Any, held: list[Fragment], data_group: dist.ProcessGroup) -> None:
    """Makes the working parameters follow master weights that were written from outside. Collective."""
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        parameters: dict[str, Any] = dict(model.named_parameters())
        for fragment in held:
            own = parameters[fragment.name].ds_tensor.view(-1)[: fragment.numel]
            own.copy_(fragment.slice_of(fragment.flat))
        persistent = optimizer.persistent_parameters
        if persistent:  # small parameters that stay gathered: gather them anew
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
        return
    mine = {fragment.name: fragment for fragment in held}
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "_hp_mapping") and not hasattr(parameter, KEPT):
            continue  # ZeRO-0: the parameter is the master
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if name in mine:
            fragment = mine[name]
            whole[fragment.start : fragment.start + fragment.numel].copy_(fragment.slice_of(fragment.flat))
        dist.all_reduce(whole, group=data_group)
        parameter.copy_(whole.view_as(parameter))


def bounded(
    model: nn.Module, optimizer: Any, bounds: Mapping[str, tuple[float, float]]
) -> list[tuple[Tensor, tuple[float, float]]]:
    """All that this rank holds of the parameters that stay in an interval, `bounds` by canonical name, to be put back
    to its end after a step: masters and working weights, which stay the same numbers since rounding keeps the order.
    What is found stays where it is as long as the optimizer does; what is frozen needs none of it."""
    held = (f for f in fragments(model, optimizer) if f.trained and f.name in bounds)
    masters = [(f.name, f.slice_of(f.flat.detach())) for f in held]
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad and name in bounds)
    parameters: list[tuple[str, Any]] = list(named)
    # A parameter is empty where ZeRO-3 has given it away.
    shards = [(name, p.ds_tensor) for name, p in parameters if hasattr(p, "ds_tensor")]
    return [(held, bounds[name]) for name, held in [*masters, *parameters, *shards]]
