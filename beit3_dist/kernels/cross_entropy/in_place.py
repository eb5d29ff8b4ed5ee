"""Cross-entropy that turns the logits into their gradient in place: one matrix [rows, classes] lives, never three.

torch's keeps the logits in fp32 and their log-softmax until the backward pass and then makes a gradient beside them.
With 64,010 words that is the largest of all activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_dist.kernels.cross_entropy.definition import at_least_fp32

CHUNK = 1 << 24
"""Logits that are widened to fp32 at a time: 64 MB."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, CHUNK // logits.shape[1])
        out = torch.cat(
            [_losses_and_gradient(part, t) for part, t in zip(logits.split(rows), targets.split(rows), strict=True)], 1
        )
        ctx.gradient = logits.detach()
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_2M: Tensor) -> tuple[Tensor, None]:
        if ctx.gradient is None:
            raise RuntimeError("this cross-entropy has gone backward before: its logits are overwritten")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(gradient_2M[0][:, None]), None


def _losses_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """[2, M] of some rows, whose logits become the cross-entropy's gradient: the softmax, less 1 at the target.

    The 1 is taken off in fp32: a share near 1 is 1 in bf16, but its distance from 1 keeps 8 bits.
    """
    wide = at_least_fp32(logits)
    top, prediction = wide.max(-1, keepdim=True)
    picked = wide.gather(1, targets[:, None]) - top
    total = wide.sub_(top).exp_().sum(-1, keepdim=True)
    wide.div_(total).scatter_add_(1, targets[:, None], torch.full_like(total, -1.0))
    if wide is not logits:
        logits.copy_(wide)
    return torch.cat([total.log() - picked, (prediction == targets[:, None]).float()], 1).t()


def cross_entropy_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """`plain_cross_entropy` of logits that nobody else reads: they are overwritten. Goes backward once."""
    return _CrossEntropy.apply(logits, targets)
