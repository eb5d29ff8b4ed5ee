"""What an optimizer is: its state, told by parameter, and how it steps on what a rank holds.

ZeRO hands an optimizer flat fp32 tensors with this rank's elements of many parameters, one behind the other. What
computes element by element needs to know no more; what needs a parameter's norm, or the whole of a matrix, is told its
`Places`. All state lies like the parameter, so that checkpoints cut and gather both alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import OptimConfig

PART = "part"
"""Key of a parameter group: which of the optimizer's parts its parameters are stepped by."""


@dataclass(frozen=True)
class Place:
    """Where elements of a parameter (a tensor rank's part of it, if tensor ranks cut it) lie in a flat tensor."""

    shape: tuple[int, ...]
    """Of the part."""
    cut: int | None
    """Dimension along which tensor ranks cut the parameter; None: each has all of it."""
    offset: int
    """Where this rank's elements begin in its flat tensor."""
    spans: list[tuple[int, int]]
    """For each replica the first of the elements that it holds and their number, which may be 0."""
    rank: int
    """This rank's place among `spans`."""

    @property
    def numel(self) -> int:
        """Of this rank's elements."""
        return self.spans[self.rank][1]

    def of(self, flat: Tensor) -> Tensor:
        """This rank's elements of a tensor that lies like the flat one: a view, 1-D."""
        return flat.view(-1).narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Places:
    """Of all parameters that an optimizer steps on."""

    flats: dict[Tensor, list[Place]]
    """By the tensor that it steps on, in one order on all replicas and tensor ranks."""
    data: dist.ProcessGroup | None = None
    """Replicas that share the elements out; None: each holds all."""
    tensor: dist.ProcessGroup | None = None
    """Tensor ranks that cut parameters; None: there is one."""


class Optimizer:
    """The description of an optimizer. A plugin's derives from it, and is registered (registry.py)."""

    name: ClassVar[str]
    offloads: ClassVar[bool] = False
    """Whether its state may lie on the CPU (DeepSpeed's offload_optimizer)."""

    @classmethod
    def check(cls, config: OptimConfig) -> None:
        """Raises ValueError where it cannot do what the config says."""

    @classmethod
    def part(cls, name: str, shape: tuple[int, ...]) -> str:
        """Which of the optimizer's parts steps on the parameter of this canonical name: groups are split by it."""
        return ""

    @classmethod
    def moments(cls, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """What is kept of a parameter from step to step: names of fp32 tensors of its shape. The first is a running
        mean of its gradients (gradient_masks.py chooses by it)."""
        raise NotImplementedError

    positive: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq"})
    """Moments that are never negative."""

    @classmethod
    def products(cls, name: str, shape: tuple[int, ...]) -> float:
        """FLOPs of matrix products in a step on a parameter."""
        return 0.0

    @classmethod
    def build(
        cls, groups: list[dict[str, Any]], config: OptimConfig, offload: bool, dtype: torch.dtype
    ) -> torch.optim.Optimizer:
        """The optimizer of parameter groups. `dtype`: that the model computes in."""
        raise NotImplementedError

    @classmethod
    def made(cls, optimizer: torch.optim.Optimizer) -> bool:
        """Whether `build` has made an optimizer."""
        raise NotImplementedError

    @classmethod
    def set_steps(cls, optimizer: torch.optim.Optimizer, state: dict[str, Any], flat: Tensor, steps: int) -> None:
        """Makes the state of a flat tensor that of one that has taken so many steps; its moments are there."""
        state["step"] = torch.tensor(float(steps), device=flat.device)


class Stepper(torch.optim.Optimizer):
    """An optimizer of our own. It is built on parameters and then given flat tensors in their place by ZeRO, which
    hands over some of them, or all, at a step: the same ones on all replicas and tensor ranks."""

    needs_places: ClassVar[bool] = False
    """Whether `place` has to say what lies where in flat tensors."""

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, defaults)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._places = Places({p: [Place(tuple(p.shape), None, 0, [(0, p.numel())], 0)] for p in parameters})

    def place(self, places: Places) -> None:
        """Says where parameters lie in the flat tensors of the steps to come."""
        self._places = places

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As DeepSpeed calls it; there is no `closure`."""
        self.advance()

    def advance(self) -> None:
        """Changes all that is `_given`, and its state."""
        raise NotImplementedError

    def _given(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """(flat tensor, its gradient, its group) of all that a step is to change."""
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    yield flat, flat.grad, group

    def _state_of(self, flat: Tensor, moments: tuple[str, ...]) -> dict[str, Any]:
        """Zeros at the first step; its steps, this one included, under "step", a scalar where the tensor lies."""
        state = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), device=flat.device)
            state.update({moment: torch.zeros_like(flat) for moment in moments})
        state["step"] += 1
        return state
