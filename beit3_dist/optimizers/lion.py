"""Lion (Chen et al. 2023): the sign of a running mean of the gradient, element by element.

    p <- (1 - lr decay) p - lr sign(beta1 m + (1 - beta1) g),    m <- beta2 m + (1 - beta2) g

Every element moves by lr, so that its authors take a learning rate 3 to 10 times lower than AdamW's and as many times
more decay, beta1 0.9 and beta2 0.99. It keeps one moment where AdamW keeps two.
"""

from __future__ import annotations

from typing import Any

import torch

from beit3_dist.config import OptimConfig
from beit3_dist.optimizers.base import Optimizer, Stepper

MOMENTS = ("exp_avg",)


class LionStepper(Stepper):
    """On flat tensors, of which it need not know what they hold."""

    def advance(self) -> None:
        for flat, gradient, group in self._given():
            mean = self._state_of(flat, MOMENTS)["exp_avg"]
            beta1, beta2 = group["betas"]
            direction = mean.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
            flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
            mean.lerp_(gradient, 1 - beta2)


class Lion(Optimizer):
    """See the file's head."""

    name = "lion"

    @classmethod
    def moments(cls, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        return MOMENTS

    @classmethod
    def build(
        cls, groups: list[dict[str, Any]], config: OptimConfig, offload: bool, dtype: torch.dtype
    ) -> torch.optim.Optimizer:
        return LionStepper(groups, lr=config.lr, betas=(config.beta1, config.beta2))

    @classmethod
    def made(cls, optimizer: torch.optim.Optimizer) -> bool:
        return isinstance(optimizer, LionStepper)
