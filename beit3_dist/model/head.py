"""A classification head together with its loss, so that no one outside has to hold all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from beit3_dist.kernels.cross_entropy.in_place import cross_entropy_in_place
from beit3_dist.kernels.linear import Product
from beit3_dist.model.cut import cut


class Head(nn.Module):
    """Hidden states [M, D] and target classes [M] -> [2, M]: cross-entropies, and 1 where the prediction is right; or,
    where no targets are given, logits [M, classes]. It is called for either: ZeRO-3 gathers its weights around calls.

    `weight` [classes, D] and `bias` [classes], untied from any embedding. The softmax is computed in fp32. `compute`
    (of the logits) and `loss` may be replaced by others of the same contract.
    """

    compute: Product = staticmethod(linear)
    loss: Callable[[Tensor, Tensor], Tensor] = staticmethod(cross_entropy_in_place)

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.empty(classes))
        cut(self, weight=0, bias=0)

    def forward(self, hidden_MD: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.logits(hidden_MD)
        return logits if targets is None else self.loss(logits, targets)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Logits [M, classes]."""
        return self.compute(hidden_MD, self.weight, self.bias)
