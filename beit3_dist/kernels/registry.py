"""The operations: what each means, the versions that compute it faster, and when each of these may serve.

An operation is a folder beside this file: definition.py says in plain torch what it means, each version has a file of
its own, and __init__.py registers them. A plugin registers a version, or an operation of its own, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., Any]
HALVES = (torch.float16, torch.bfloat16)


class Place(NamedTuple):
    """Where an operation is to be computed, and on what."""

    device: str
    """cuda or cpu."""
    dtype: torch.dtype
    width: int
    """Numbers of a row of what it takes, in attention of a head; 0: not known."""


@dataclass(frozen=True)
class Version:
    """One way to compute an operation."""

    name: str
    module: str
    """Its file, imported not before it is to compute; the function there has the operation's name."""
    kernels: tuple[str, ...] = ()
    """The values of the config's `kernels` that may mean it."""
    lacks: Callable[[Place], str] = lambda place: ""
    """What is missing for it to serve at a place, in words; empty where it serves."""
    roundings: int = 1
    """To the type of its inputs, from them to its results: so many times as far it may be from the definition."""


@dataclass(frozen=True)
class Sizes:
    """Of a model and a micro-batch."""

    tokens: int = 1536
    width: int = 768
    ffn_width: int = 3072
    heads: int = 12
    masked: int = 152
    """Tokens that a head classifies."""
    classes: int = 64_010


@dataclass(frozen=True)
class Case:
    """A call of an operation, for the tests and the benchmark."""

    shapes: Sequence[tuple[int, ...]]
    """Of its leaves: tensors of floating-point numbers that have gradients."""
    call: Callable[..., Sequence[Tensor]]
    """(a function of the operation, *leaves) -> what it computes."""
    label: str = ""
    rowwise: int = 1
    """So many of the first leaves have a row for each row of the results."""
    separate: bool = True
    """Whether no row of the results knows another row."""

    def place(self, device: str, dtype: torch.dtype) -> Place:
        """Where the case would be computed."""
        return Place(device, dtype, self.shapes[0][-1])

    def leaves(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Normal numbers; matrices of weights are as small as keeps a product's deviation near 1."""
        draw, leaves = torch.Generator(device).manual_seed(1), []
        for number, shape in enumerate(self.shapes):
            leaf = torch.randn(shape, generator=draw, device=device, dtype=dtype)
            weights = number >= self.rowwise and len(shape) == 2
            leaves.append((leaf / shape[1] ** 0.5 if weights else leaf).requires_grad_())
        return leaves

    def train(self, function: Function, leaves: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        """The results of a function of the operation and the gradients of the leaves. `given`: those of the results."""
        results = list(self.call(function, *leaves))
        ends = [(result, g.to(result.dtype)) for result, g in zip(results, given, strict=True) if result.requires_grad]
        if not ends:  # it has no gradients
            return results
        outputs, gradients = zip(*ends, strict=True)
        return [*results, *torch.autograd.grad(outputs, leaves, gradients)]


@dataclass(frozen=True)
class Operation:
    """What is computed, and by whom."""

    name: str
    definition: Function
    cases: Callable[[Sizes], list[Case]]
    versions: list[Version] = field(default_factory=list)
    """Those that are preferred first."""

    def serving(self, place: Place, kernels: str | None = None) -> list[Version]:
        """The versions that may serve at a place. `kernels`: those alone that this value of the config may mean."""
        return [v for v in self.versions if (kernels is None or kernels in v.kernels) and not v.lacks(place)]

    def version(self, name: str) -> Version:
        """The one of a name that is there."""
        return next(version for version in self.versions if version.name == name)

    def function(self, version: Version) -> Function:
        """What computes the operation in a version."""
        return getattr(import_module(version.module), self.name)


_operations: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Raises ValueError where there is another one of its name."""
    if _operations.setdefault(operation.name, operation) is not operation:
        raise ValueError(f"there is an operation {operation.name!r} already: give the other one another name")
    return operation


def register_version(operation: str, version: Version) -> None:
    """Of an operation that is there; it is preferred to all that were there before it."""
    versions = operations()[operation].versions
    if version.name in (other.name for other in versions):
        raise ValueError(f"{operation} has a version {version.name!r} already: give the other one another name")
    versions.insert(0, version)


def operations() -> dict[str, Operation]:
    """All operations by name."""
    for file in sorted(Path(__file__).parent.glob("*/__init__.py")):
        import_module(f"{__package__}.{file.parent.name}")
    return dict(sorted(_operations.items()))


def installed(module: str) -> bool:
    """Whether a module can be imported, which is not tried."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False
