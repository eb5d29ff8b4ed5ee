"""How parameters are cut over tensor-parallel ranks: each layer says so of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.functional import pad

Layer = TypeVar("Layer", bound=nn.Module)


def cut(layer: Layer, **dimensions: int) -> Layer:
    """The layer, which says from now on along which dimension each of these parameters is cut. What a layer does not
    name, every rank holds as a whole."""
    layer.cut_dimensions = dimensions  # type: ignore[assignment]  # not a tensor
    return layer


def dimensions_of(layer: nn.Module) -> dict[str, int]:
    """What a layer has said: parameter -> dimension."""
    found = getattr(layer, "cut_dimensions", {})
    assert isinstance(found, dict)
    return found


def cuts_of(model: nn.Module) -> dict[str, int]:
    """Canonical name -> dimension of every parameter of a whole model that is cut."""
    return {
        f"{prefix}.{name}": dimension
        for prefix, layer in model.named_modules()
        for name, dimension in dimensions_of(layer).items()
    }


@dataclass(frozen=True)
class Cut:
    """One of the equal parts that a parameter is cut into along a dimension; the last ones are padded with zeros."""

    dimension: int
    part: int
    parts: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-n // self.parts) if d == self.dimension else n for d, n in enumerate(whole))

    def of(self, whole: Tensor) -> Tensor:
        missing = -whole.shape[self.dimension] % self.parts
        if missing:
            whole = pad(whole, (0, 0) * (whole.ndim - 1 - self.dimension) + (0, missing))
        return whole.chunk(self.parts, dim=self.dimension)[self.part].contiguous()


def cut_for(cuts: dict[str, int], name: str, rank: int, ranks: int) -> Cut | None:
    """The part of a parameter that a tensor rank holds; None: the whole."""
    return Cut(cuts[name], rank, ranks) if ranks > 1 and name in cuts else None
