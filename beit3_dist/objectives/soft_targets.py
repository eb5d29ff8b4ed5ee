"""Soft targets: distributions over classes that another network makes, for a head's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Logits whose distributions are made at a time, fp32: 64 MB."""
Targets = Callable[[slice], tuple[Tensor, Tensor]]
"""Some of the rows -> the classes' shares of their targets, fp32 [m, C], and the class that is right, int64 [m]."""
Taught = tuple[Tensor, float]
"""What a teacher says of the rows, logits [M, C], and its share alpha of their targets."""


def divergence(logits_MC: Tensor, teacher: Callable[[slice], Tensor], temperature: float = 1.0) -> Tensor:
    """[2, M] fp32: KL(softmax(t / T) || softmax(s / T)) of each row, and 1 where both have the same largest class.

    T = `temperature`; `teacher` gives its logits t [m, C] of some of the M rows, so that nobody holds all of them
    beside the student's s, which nobody else reads: they are overwritten by their gradient. Goes backward once.
    (Hinton et al. 2015 multiply by T^2; ViT-BERT, Li et al. 2021, does not.)
    """

    def targets(rows: slice) -> tuple[Tensor, Tensor]:
        shares = (teacher(rows).float() / temperature).softmax(1)
        return shares, shares.argmax(1)

    return _CrossEntropy.apply(logits_MC, targets, temperature, True)


def mixed_cross_entropy(logits_MC: Tensor, classes: Tensor, teacher_MC: Tensor, alpha: float) -> Tensor:
    """[2, M] fp32: cross-entropies with the shares alpha softmax(t) + (1 - alpha) the true class, int64 [M] (ALBEF, eq.
    7), and 1 where the largest class is the true one. `logits_MC` are overwritten, as above."""

    def targets(rows: slice) -> tuple[Tensor, Tensor]:
        shares, true = alpha * teacher_MC[rows].float().softmax(1), classes[rows]
        return shares.scatter_add_(1, true[:, None], shares.new_full((len(true), 1), 1 - alpha)), true

    return _CrossEntropy.apply(logits_MC, targets, 1.0, False)


def losses_of(head: Callable[..., Tensor], classes: Tensor, taught: Taught | None) -> Tensor:
    """[2, M] of true classes, int64 [M], alone or as mixed with what is taught. `head`: () -> logits, or (classes) ->
    losses and right predictions, as `Head` is called."""
    return head(classes) if taught is None else mixed_cross_entropy(head(), classes, *taught)


class _CrossEntropy(torch.autograd.Function):
    """Of softmax(logits / temperature) with given shares, less the shares' own entropy where it is asked for."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Targets, temperature: float, less_entropy: bool) -> Tensor:
        at_once = max(1, CHUNK // logits.shape[1])
        found = [torch.zeros(2, 0, device=logits.device)]
        for first in range(0, len(logits), at_once):
            rows = slice(first, first + at_once)
            shares, right = targets(rows)
            wide = (logits[rows].float() / temperature).log_softmax(1)
            losses = -(shares * wide).sum(1)
            if less_entropy:
                losses = losses - torch.special.entr(shares).sum(1)
            found.append(torch.stack([losses, (wide.argmax(1) == right).float()]))
            logits[rows] = (wide.exp_() - shares) / temperature
        ctx.gradient = logits.detach()
        return torch.cat(found, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_2M: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.gradient is None:
            raise RuntimeError("this cross-entropy has gone backward before: its logits are overwritten")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(gradient_2M[0][:, None]), None, None, None
