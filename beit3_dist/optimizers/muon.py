"""Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for all else.

    m <- mu m + (1 - mu) g,    O = NS(mu m + (1 - mu) g),
    P <- (1 - lr decay) P - 0.2 sqrt(max(rows, columns)) lr O

NS is five Newton-Schulz steps, which bring all singular values of a matrix near 1. The factor makes an update about as
large as AdamW's (Liu et al. 2025, and torch.optim.Muon's match_rms_adamw), so that both share learning rate and decay.
NS is computed in bf16, and in fp32 where the model is.

torch.optim.Muon takes a whole matrix on every rank; DeepSpeed's knows neither tensor parallelism nor another layout's
checkpoints. So the exchange (whole.py) is here, and NS with it: torch has no public function for that alone.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from beit3_dist.config import OptimConfig
from beit3_dist.optimizers import adamw as others
from beit3_dist.optimizers.base import PART, Optimizer, Stepper
from beit3_dist.optimizers.whole import on_whole_matrices, whole_shape

MOMENTS = ("momentum_buffer",)
HIDDEN = "hidden"
"""The part of the matrices that Muon steps on."""
COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
"""Of the polynomial, how often it is taken, and the least norm that is divided by: Jordan's."""


def is_hidden(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix between hidden states: those of attention and experts in all blocks, the image
    encoder's and the decoder's too; no embedding and no head."""
    return len(shape) == 2 and "blocks." in name


def orthogonalized(matrix: Tensor) -> Tensor:
    """NS of a matrix [m, n], in its type: a product of orthogonal matrices and singular values of about 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=EPS)  # so that no singular value is above 1
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonStepper(Stepper):
    """On flat tensors with known places."""

    needs_places = True

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype, **defaults: Any) -> None:
        """`dtype`: that NS is computed in."""
        super().__init__(groups, **defaults)
        self._dtype = dtype

    def advance(self) -> None:
        hidden: list[tuple[Tensor, dict[str, Any], Tensor]] = []
        for flat, gradient, group in self._given():
            if group[PART] == HIDDEN:
                mean, momentum = self._state_of(flat, MOMENTS)["momentum_buffer"], group["momentum"]
                mean.lerp_(gradient, 1 - momentum)
                hidden.append((flat, group, gradient.lerp(mean, momentum).to(self._dtype)))
            else:
                self._adamw(flat, gradient, group)
        if not hidden:
            return
        pieces = [(place, place.of(mean)) for flat, _, mean in hidden for place in self._places.flats[flat]]
        groups = chain.from_iterable([(flat, group)] * len(self._places.flats[flat]) for flat, group, _ in hidden)
        for flat, group, _ in hidden:
            flat.mul_(1 - group["lr"] * group["weight_decay"])
        directions = on_whole_matrices(orthogonalized, pieces, self._places)
        for (flat, group), (place, _), direction in zip(groups, pieces, directions, strict=True):
            size = 0.2 * max(whole_shape(place, self._places)) ** 0.5
            place.of(flat).add_(direction, alpha=-group["lr"] * size)

    def _adamw(self, flat: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self._state_of(flat, others.MOMENTS), group["betas"]
        state["step"] -= 1  # which torch counts by itself
        first, second = ([state[moment]] for moment in others.MOMENTS)
        adamw(
            [flat], [gradient], first, second, [], [state["step"]], fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


class Muon(Optimizer):
    """See the file's head."""

    name = "muon"

    @classmethod
    def part(cls, name: str, shape: tuple[int, ...]) -> str:
        return HIDDEN if is_hidden(name, shape) else "others"

    @classmethod
    def moments(cls, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        return MOMENTS if is_hidden(name, shape) else others.MOMENTS

    @classmethod
    def products(cls, name: str, shape: tuple[int, ...]) -> float:
        if not is_hidden(name, shape):
            return 0.0
        few, many = sorted(shape)
        return STEPS * 2.0 * (2 * few * few * many + few**3)

    @classmethod
    def build(
        cls, groups: list[dict[str, Any]], config: OptimConfig, offload: bool, dtype: torch.dtype
    ) -> torch.optim.Optimizer:
        betas = config.beta1, config.beta2
        return MuonStepper(groups, dtype, lr=config.lr, betas=betas, eps=config.eps, momentum=config.momentum)

    @classmethod
    def made(cls, optimizer: torch.optim.Optimizer) -> bool:
        return isinstance(optimizer, MuonStepper)
