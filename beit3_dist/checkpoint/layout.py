"""What a rank holds of the parameters, under names and places that no layout changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from beit3_dist.model.cut import Cut


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
