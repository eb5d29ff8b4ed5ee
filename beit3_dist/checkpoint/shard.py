"""A shard: what a rank holds of a parameter, under a name and a place that no parallel layout changes.

Three words that differ. A `Cut` (model/cut.py) is a place alone: which of the equal parts of a parameter a tensor rank
has. A `Shard` is elements of that part, or of an uncut parameter, which this rank saves or loads. A `Fragment`
(parallel/fragments.py) is where such elements lie in DeepSpeed's flat buffers. A file shard_NNNNN.safetensors has all
shards of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from beit3_dist.model.cut import Cut


@dataclass
class Shard:
    """Elements [start, start + numel) of a flattened parameter, or of a part of it, with all that belongs to them."""

    name: str
    """Canonical name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the shard in the flattened parameter or part."""
    tensors: dict[str, Tensor]
    """Suffix of the stored name -> values, float32 [numel]: "" for the master weights, "/exp_avg" ... for moments."""
    cut: Cut | None = None
    """Where the parameter is cut over tensor ranks: the part that the shard belongs to."""

    @property
    def numel(self) -> int:
        return self.tensors[""].numel()
