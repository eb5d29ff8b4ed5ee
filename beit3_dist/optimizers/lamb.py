"""LAMB (You et al. 2020): AdamW's direction, of each matrix made as long as the matrix.

    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + decay p,    p <- p - lr |p| / |u| u

As NVIDIA's and timm's, it leaves what does not decay (biases, norms, tokens, positions) at lr u, and so a parameter
whose norm, or whose direction's, is 0. The norms are those of whole parameters: replicas and tensor ranks add their
squares up, once for all that a step is given. For batches of many thousands; its authors take a learning rate of
about 1e-2 there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import OptimConfig, require
from beit3_dist.optimizers.adamw import MOMENTS
from beit3_dist.optimizers.base import Optimizer, Place, Stepper


class LambStepper(Stepper):
    """On flat tensors with known places."""

    needs_places = True

    def advance(self) -> None:
        changed = [(flat, self._direction(flat, gradient, group), group) for flat, gradient, group in self._given()]
        adapted = [
            (place, place.of(flat), place.of(direction))
            for flat, direction, group in changed
            if group["weight_decay"]
            for place in self._places.flats[flat]
        ]
        if adapted:
            for (_, _, direction), ratio in zip(adapted, self._ratios(adapted), strict=True):
                direction.mul_(ratio)
        for flat, direction, group in changed:
            flat.add_(direction, alpha=-group["lr"])

    def _direction(self, flat: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """u, like the flat tensor."""
        state, (beta1, beta2) = self._state_of(flat, MOMENTS), group["betas"]
        first, second = (state[moment] for moment in MOMENTS)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        steps = state["step"].double()  # in fp32, 1 - 0.98 has a tenth of its digits
        below = (second / (1 - beta2**steps).float()).sqrt_().add_(group["eps"])
        direction = (first / (1 - beta1**steps).float()).div_(below)
        return direction.add_(flat, alpha=group["weight_decay"]) if group["weight_decay"] else direction

    def _ratios(self, adapted: list[tuple[Place, Tensor, Tensor]]) -> Tensor:
        """|p| / |u| of each parameter; [parameters]."""
        both = [weights for _, weights, _ in adapted], [directions for _, _, directions in adapted]
        squares = torch.stack([torch.stack(torch._foreach_norm(own)) for own in both]).square_()  # [2, parameters]
        if self._places.data is not None:
            dist.all_reduce(squares, group=self._places.data)
        if self._places.tensor is not None:
            is_cut = torch.tensor([place.cut is not None for place, _, _ in adapted], device=squares.device)
            everyones = squares.where(is_cut, 0)
            dist.all_reduce(everyones, group=self._places.tensor)
            squares = everyones.where(is_cut, squares)
        weights, directions = squares.sqrt_()
        return (weights / directions).where((weights > 0) & (directions > 0), 1.0)


class Lamb(Optimizer):
    """See the file's head."""

    name = "lamb"

    @classmethod
    def check(cls, config: OptimConfig) -> None:
        require(
            config.weight_decay > 0,
            "optim.weight_decay=0: lamb adapts the steps of what decays, and of nothing then: give it a weight_decay "
            "above 0, or use optim.name=adamw",
        )

    @classmethod
    def moments(cls, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        return MOMENTS

    @classmethod
    def build(
        cls, groups: list[dict[str, Any]], config: OptimConfig, offload: bool, dtype: torch.dtype
    ) -> torch.optim.Optimizer:
        return LambStepper(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)

    @classmethod
    def made(cls, optimizer: torch.optim.Optimizer) -> bool:
        return isinstance(optimizer, LambStepper)
