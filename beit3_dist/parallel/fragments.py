"""Where this rank's shard of every parameter lives in DeepSpeed: fp32 master weights and the optimizer's moments.

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

from beit3_dist.optimizers.base import Place, Places, Stepper
from beit3_dist.optimizers.registry import described
from beit3_dist.parallel.mesh import Groups

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


def flat_tensors(model: nn.Module, optimizer: Any) -> list[tuple[Tensor, list[str]]]:
    """The tensors that the optimizer steps on, each with the parameters in it, in one order on all replicas; a rank may
    hold nothing of one. `optimizer`: the DeepSpeed engine's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for groups, masters in (  # ZeRO-3; ZeRO-1 in fp32 and ZeRO-2; ZeRO-1 in bf16
        ("fp16_groups", "fp32_partitioned_groups_flat"),
        ("bit16_groups", "single_partition_of_fp32_groups"),
        ("bf16_groups", "fp32_groups_flat_partition"),
    ):
        if hasattr(optimizer, groups):
            both = zip(getattr(optimizer, masters), getattr(optimizer, groups), strict=True)
            return [(flat, [names[id(parameter)] for parameter in group]) for flat, group in both]
    return [(parameter, [name]) for name, parameter in model.named_parameters() if parameter.requires_grad]


def tell_places(model: nn.Module, optimizer: Any, cuts: Mapping[str, int], groups: Groups, zero_stage: int) -> None:
    """Tells an optimizer that needs it where each parameter lies in the tensors that it steps on. Collective."""
    stepper = inner_optimizer(optimizer)
    if isinstance(stepper, Stepper) and stepper.needs_places:
        stepper.place(_places(model, optimizer, cuts, groups, zero_stage))


def _places(model: nn.Module, optimizer: Any, cuts: Mapping[str, int], groups: Groups, zero_stage: int) -> Places:
    mesh, data = groups.mesh, groups.data if zero_stage > 0 else None
    held = {fragment.name: fragment for fragment in fragments(model, optimizer)}
    shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters()}
    flats = flat_tensors(model, optimizer)
    names = [name for _, those in flats for name in those]
    mine = [(held[name].start, held[name].numel) if name in held else (0, 0) for name in names]
    spans = [torch.tensor(mine, dtype=torch.int64, device=mesh.device)]
    if data is not None:
        here, spans = spans[0], [torch.empty_like(spans[0]) for _ in range(mesh.data)]
        dist.all_gather(spans, here, group=data)
    by_name = {name: [(s, n) for s, n in own] for name, own in zip(names, torch.stack(spans, 1).tolist(), strict=True)}
    rank = mesh.data_rank if data is not None else 0

    def place(name: str) -> Place:
        cut = cuts.get(name) if mesh.tensor > 1 else None
        return Place(shapes[name], cut, held[name].offset if name in held else 0, by_name[name], rank)

    tensor = groups.tensor if mesh.tensor > 1 else None
    return Places({flat: [place(name) for name in those] for flat, those in flats}, data, tensor)


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
    inner = inner_optimizer(optimizer)
    state = inner.state[fragment.flat]
    return {key: fragment.slice_of(state[key]) for key in described(inner).moments(fragment.name, fragment.shape)}


def create_optimizer_state(optimizer: Any, held: list[Fragment], steps: int) -> None:
    """Gives an optimizer that has not stepped yet the state of one that has taken `steps` steps, its moments zero."""
    inner = inner_optimizer(optimizer)
    kind = described(inner)
    for fragment in (one for one in held if one.trained):
        state, moments = inner.state[fragment.flat], kind.moments(fragment.name, fragment.shape)
        if moments[0] in state:
            continue
        state.update({key: torch.zeros_like(fragment.flat, dtype=torch.float32) for key in moments})
        kind.set_steps(inner, state, fragment.flat, steps)


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
