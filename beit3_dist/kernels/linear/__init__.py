"""A linear layer: torch's product, which is the operation's definition, or another one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import linear

from beit3_dist.kernels.registry import Case, Operation, Sizes, register

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [..., D], weight [F, D], bias [F] or none) -> x weight' + bias, [..., F]."""


class Linear(nn.Linear):
    """torch's linear layer. `compute` may be replaced by another version of `operation`: also with ZeRO-3, for which
    parallel/engine.py has a product that keeps no gathered weights. Fused blocks join q, k and v by torch's."""

    operation = "linear"
    compute: Product = staticmethod(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias)


def _cases(sizes: Sizes) -> list[Case]:
    shapes = [(sizes.tokens, sizes.width), (sizes.ffn_width, sizes.width), (sizes.ffn_width,)]
    return [Case(shapes, lambda compute, *leaves: [compute(*leaves)])]


register(Operation("linear", linear, _cases))
