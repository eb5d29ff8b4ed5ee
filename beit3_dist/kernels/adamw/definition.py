"""AdamW (Loshchilov and Hutter 2019) over parameters that lie one behind the other in flat buffers.

    g <- factor g,    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,
    p <- (1 - lr decay) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The gradients may be of a narrower type than p, m and v, and lie anywhere; the weights that the model computes with are
p rounded to their type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flat:
    """The buffers of some parameters, [N] each."""

    masters: Tensor
    """p, fp32."""
    first: Tensor
    """m, fp32."""
    second: Tensor
    """v, fp32."""
    weights: Tensor
    """p in the type that the model computes with."""


@dataclass(frozen=True)
class Update:
    """The numbers of a step."""

    factor: float
    """That the gradients are clipped by."""
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    steps: int
    """t, this one included."""

    @property
    def step_size(self) -> float:
        """lr / (1 - beta1^t)."""
        return self.lr / (1 - self.beta1**self.steps)

    @property
    def second_scale(self) -> float:
        """sqrt(1 - beta2^t)."""
        return (1 - self.beta2**self.steps) ** 0.5


def plain_adamw(flat: Flat, gradients: Sequence[Tensor | None], sizes: Sequence[int], update: Update) -> None:
    """Changes the buffers in place. gradients: of parameters of `sizes` elements, in the order of the buffers; None
    counts as zeros. What lies behind the last of them stays as it is."""
    start = 0
    for gradient, size in zip(gradients, sizes, strict=True):
        p, m, v, weights = (
            buffer[start : start + size] for buffer in (flat.masters, flat.first, flat.second, flat.weights)
        )
        g = torch.zeros_like(p) if gradient is None else gradient.flatten().to(p.dtype) * update.factor
        m.mul_(update.beta1).add_(g, alpha=1 - update.beta1)
        v.mul_(update.beta2).addcmul_(g, g, value=1 - update.beta2)
        p.mul_(1 - update.lr * update.weight_decay)
        p.addcdiv_(m, v.sqrt() / update.second_scale + update.eps, value=-update.step_size)
        weights.copy_(p)
        start += size
