"""The Multiway idea: each token passes the expert of its kind, and an expert's tokens are one contiguous slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from beit3_dist.config import ModelConfig, Sharing
from beit3_dist.kernels.gelu_layer_norm import GeluLayerNorm
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.cut import cut
from beit3_dist.model.token_layout import Segments


class Multiway(nn.ModuleDict):
    """One module per expert, applied to the expert's slice of the tokens.

    `experts` are names in the order of their slices (see `Segments.sizes`). Every expert runs in every pass, on zero
    rows too, so that all ranks of a ZeRO-3 group run the same modules.
    """

    def __init__(self, experts: tuple[str, ...], build: Callable[[], nn.Module]) -> None:
        super().__init__({name: build() for name in experts})
        self.experts = experts

    def forward(self, x_TD: Tensor, layout: Segments) -> Tensor:
        return join(self.each(self.slices(x_TD, layout)))

    def slices(self, x_TD: Tensor, layout: Segments) -> list[Tensor]:
        return [x_TD] if len(self.experts) == 1 else list(x_TD.split(layout.sizes(self.experts)))

    def each(self, slices: list[Tensor]) -> list[Tensor]:
        return [self[name](part) for name, part in zip(self.experts, slices, strict=True)]


def modules_of(sharing: Sharing) -> tuple[str, ...]:
    """The names under which a part of the model has its modules: one for all tokens, or one for each modality."""
    return ("shared",) if sharing == "shared" else ("vision", "language")


def join(slices: list[Tensor]) -> Tensor:
    """One matrix of all tokens again."""
    return slices[0] if len(slices) == 1 else torch.cat(slices)


def fork(x_TD: Tensor, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """The matrix for the residual connection, and its slices for the experts of a branch.

    Backward the slices' gradients are added to the residual's where they belong; torch would join them first.
    """
    if torch.compiler.is_compiling():  # a compiler fuses plain operations
        return x_TD, list(x_TD.split(sizes))
    x_TD, *slices = _Fork.apply(x_TD, sizes)
    return x_TD, slices


def merge(x_TD: Tensor, slices: list[Tensor], keep_T: Tensor | None) -> Tensor:
    """x + branch: the residual connection where a branch's slices come back, with drop path's factors `keep_T`.

    Each is added to its rows of x; joined first, they would be written and read once more.
    """
    if torch.compiler.is_compiling():
        branch_TD = join(slices)
        return x_TD + branch_TD if keep_T is None else torch.addcmul(x_TD, branch_TD, keep_T[:, None])
    return _Merge.apply(x_TD, keep_T, *slices)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return x_TD.view_as(x_TD), *x_TD.split(sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor, *of_slices: Tensor) -> tuple[Tensor, None]:
        total = torch.empty_like(gradient_TD)
        sizes = [len(part) for part in of_slices]
        for out, of_residual, of_slice in zip(total.split(sizes), gradient_TD.split(sizes), of_slices, strict=True):
            torch.add(of_residual, of_slice, out=out)
        return total, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, keep_T: Tensor | None, *slices: Tensor) -> Tensor:
        ctx.save_for_backward(keep_T)
        ctx.sizes = [len(part) for part in slices]
        total = torch.empty_like(x_TD)
        parts = zip(total.split(ctx.sizes), x_TD.split(ctx.sizes), slices, strict=True)
        if keep_T is None:
            for out, x, part in parts:
                torch.add(x, part, out=out)
        else:
            for (out, x, part), keep in zip(parts, keep_T.split(ctx.sizes), strict=True):
                torch.addcmul(x, part, keep[:, None], out=out)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        (keep_T,) = ctx.saved_tensors
        of_branch = gradient_TD if keep_T is None else gradient_TD * keep_T[:, None]
        return gradient_TD, None, *of_branch.split(ctx.sizes)


class FeedForward(nn.Module):
    """One expert: LayerNorm, fc1 [F, D], GELU, (sub-LayerNorm,) fc2 [D, F]. The norm belongs to the expert, also where
    it stands behind the residual connection.

    `enter` and `leave` are where tensor parallelism communicates; without it they change nothing.
    """

    enter: Callable[[Tensor], Tensor] = staticmethod(lambda x_TD: x_TD)
    leave: Callable[[Tensor], Tensor] = staticmethod(lambda x_TD: x_TD)

    norms_before = True
    """Whether the norm comes first; else it is the block's to apply."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, eps = config.width, config.ffn_width, config.layer_norm_eps
        self.norm = LayerNorm(width, eps)
        self.fc1 = cut(Linear(width, inner), weight=0, bias=0)
        self.inner_norm = cut(GeluLayerNorm(inner, eps), weight=0, bias=0) if config.sub_layernorm else None
        self.fc2 = cut(Linear(inner, width), weight=1)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden_TF = self.fc1(self.enter(self.norm(x_TD) if self.norms_before else x_TD))
        return self.leave(self.fc2(gelu(hidden_TF) if self.inner_norm is None else self.inner_norm(hidden_TF)))
