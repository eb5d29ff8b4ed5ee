"""A residual connection and the LayerNorm behind it, for tokens that lie expert by expert.

    r = x + keep (branch + bias),    y = LayerNorm(r) with the weights of the token's expert

Either half may be missing. `branch` and `y` come and go as one slice for each expert; the bias of the projection that
made the branch is added here, so that its gradient costs no pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


@dataclass(frozen=True)
class Branch:
    """What is added to the tokens: a slice [T_e, D] for each expert, without its projection's bias [D]."""

    slices: list[Tensor]
    biases: list[Tensor]
    place_T: Tensor | None = None
    """int64 [T], each token's row in the only slice, where it lies in another order."""
    kept: bool = False
    """Whether drop path's factors are in the slices already: of the biases they are not."""


@dataclass(frozen=True)
class Norms:
    """The LayerNorms of some experts: how many tokens each has, weights [D] and biases [D]."""

    sizes: list[int]
    weights: list[Tensor]
    biases: list[Tensor]
    eps: float
    place_T: Tensor | None = None
    """int64 [T], a permutation: each token's row in the only y, where that is to lie in another order."""
    dtype: torch.dtype | None = None
    """Of y; None: of the tokens."""


def plain_residual_norm(
    x_TD: Tensor, branch: Branch | None, keep_T: Tensor | None, norms: Norms | None
) -> tuple[Tensor, list[Tensor]]:
    """r [T, D], and y for each expert of `norms` [T_e, D]. keep_T: drop path's factor of each token; None: ones."""
    if branch is not None:
        rows_TD = torch.cat(branch.slices)
        rows_TD = rows_TD if branch.place_T is None else rows_TD[branch.place_T]
        biases_TD = torch.cat(
            [bias.expand(len(part), -1) for part, bias in zip(branch.slices, branch.biases, strict=True)]
        )
        keep_T1 = 1.0 if keep_T is None else keep_T[:, None]
        x_TD = x_TD + (rows_TD + keep_T1 * biases_TD if branch.kept else keep_T1 * (rows_TD + biases_TD))
    if norms is None:
        return x_TD, []
    normal = [
        layer_norm(part, weight.shape, weight, bias, norms.eps).to(norms.dtype or part.dtype)
        for part, weight, bias in zip(x_TD.split(norms.sizes), norms.weights, norms.biases, strict=True)
    ]
    if norms.place_T is not None:
        normal = [torch.empty_like(normal[0]).index_copy(0, norms.place_T, normal[0])]
    return x_TD, normal


def plain_gathered_norm(x_TD: Tensor, place_T: Tensor, norms: Norms) -> list[Tensor]:
    """The LayerNorms of x[place], for each expert [T_e, D]. place_T: int64 [T], a permutation; nobody else reads x."""
    return plain_residual_norm(x_TD[place_T], None, None, norms)[1]
