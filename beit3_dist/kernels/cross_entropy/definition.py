"""Cross-entropy, and which predictions are right; of given logits or of a head's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [M, classes]; targets: int64 [M].

    -> [2, M], at least fp32: cross-entropies, and 1 where the largest logit (of equal ones the first) is the target's.
    """
    wide = at_least_fp32(logits)
    correct = (wide.argmax(-1) == targets).float()
    return torch.stack([cross_entropy(wide, targets, reduction="none"), correct])


def plain_head_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """That of the logits hidden W' + b. hidden: [M, D]; weight: [classes, D]; bias: [classes]; targets: int64 [M]."""
    return plain_cross_entropy(linear(hidden, weight, bias), targets)


def at_least_fp32(logits: Tensor) -> Tensor:
    """The same tensor where it is that."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
