"""A linear layer whose product may be computed by another function."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import linear

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [..., D], weight [F, D], bias [F] or none) -> x weight' + bias, [..., F]."""


class Linear(nn.Linear):
    """torch's linear layer. `compute` may be replaced by another product of the same signature."""

    compute: Product = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias)
