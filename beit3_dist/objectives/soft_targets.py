"""Soft targets: another network's distribution over classes, for a head's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 24
"""Logits whose distributions are made at a time, fp32: 64 MB."""


def divergence(logits_MC: Tensor, teacher: Callable[[slice], Tensor], temperature: float = 1.0) -> Tensor:
    """[2, M] fp32: KL(softmax(t / T) || softmax(s / T)) of each row, and 1 where both have the same largest class.

    T = `temperature`; `teacher` gives its logits t [m, C] of some of the M rows, so that nobody holds all of them
    beside the student's s, which nobody else reads: they are overwritten by their gradient. Goes backward once.
    (Hinton et al. 2015 multiply by T^2; ViT-BERT, Li et al. 2021, does not.)
    """
    return _Divergence.apply(logits_MC, teacher, temperature)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Callable[[slice], Tensor], temperature: float) -> Tensor:
        at_once = max(1, CHUNK // logits.shape[1])
        found = [torch.zeros(2, 0, device=logits.device)]
        for first in range(0, len(logits), at_once):
            rows = slice(first, first + at_once)
            wide, theirs = logits[rows].float() / temperature, teacher(rows).float() / temperature
            alike = (wide.argmax(1) == theirs.argmax(1)).float()
            theirs = theirs.log_softmax(1)
            wide = wide.log_softmax(1)
            shares = theirs.exp()
            found.append(torch.stack([(shares * (theirs - wide)).sum(1), alike]))
            logits[rows] = (wide.exp_() - shares) / temperature
        ctx.gradient = logits.detach()
        return torch.cat(found, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_2M: Tensor) -> tuple[Tensor, None, None]:
        if ctx.gradient is None:
            raise RuntimeError("this divergence has gone backward before: its logits are overwritten")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(gradient_2M[0][:, None]), None, None
