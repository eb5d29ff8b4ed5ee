"""What a rank holds of the parameters, under names and places that no layout changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Cut:
    """One of the equal parts that a parameter is cut into along a dimension; the last ones are padded with zeros."""

    dimension: int
    part: int
    parts: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(-(-n // self.parts) if d == self.dimension else n for d, n in enumerate(whole))

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole parameter."""
        rows = self.shape(tuple(whole.shape))[self.dimension]
        begin, end = (min(n * rows, whole.shape[self.dimension]) for n in (self.part, self.part + 1))
        mine = whole.narrow(self.dimension, begin, end - begin)
        missing = rows - mine.shape[self.dimension]
        return pad(mine, (0, 0) * (whole.ndim - 1 - self.dimension) + (0, missing)) if missing else mine


@dataclass
class Piece:
    """Elements [start, start + numel) of a flattened parameter, or of a part of it, with all that belongs to them."""

    name: str
    """Canonical name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the piece in the flattened parameter or part."""
    tensors: dict[str, Tensor]
    """Suffix of the stored name -> values, float32 [numel]: "" for the master weights, "/exp_avg" ... for moments."""
    cut: Cut | None = None
    """Where the parameter is cut over tensor ranks: the part that the piece belongs to."""

    @property
    def numel(self) -> int:
        """Elements of the piece."""
        return self.tensors[""].numel()
