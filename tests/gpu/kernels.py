"""Every kernel, its definition and inputs of the recipes' widths: the table that test_kernels.py goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from beit3_dist.kernels import cross_entropy as plain_entropy
from beit3_dist.kernels import gelu_layer_norm as plain_gelu
from beit3_dist.kernels.residual_norm import Branch, Norms, plain_residual_norm
from beit3_dist.kernels.triton import cross_entropy, residual_norm, sums
from beit3_dist.kernels.triton import gelu as triton_gelu
from beit3_dist.kernels.triton import gelu_layer_norm as triton_gelu_norm
from beit3_dist.kernels.triton import layer_norm as triton_norm
from beit3_dist.kernels.varlen_attention import VARLEN_ATTENTION, plain_varlen_attention
from tests.device import DEVICE, ON_GPU

EPS = 1e-5
TOKENS = 4099 if ON_GPU else 5
"""Rows of the matrices; no power of two."""
WIDTH, FFN, HEADS, HEAD_DIM = (1408, 6144, 16, 88) if ON_GPU else (24, 40, 2, 8)
"""The giant's."""
CLASSES = 64_010 if ON_GPU else 70
"""Of the recipes' text head: no multiple of 16 bytes in bf16."""
MASKED = 515 if ON_GPU else 3
"""Masked positions."""

Function = Callable[..., Tensor | list[Tensor]]


@dataclass(frozen=True)
class Kernel:
    """One operation in two ways, which take the same leaves and return tensors of as many rows as the first leaf."""

    name: str
    ours: Function
    definition: Function
    shapes: list[tuple[int, ...]]
    """Of the leaves: floating-point tensors that have gradients."""
    rowwise: int = 1
    """So many of the first leaves have a row for each row of the result."""
    widest: int = 0
    """Columns of the widest matrix that it reads or writes, where no row knows another one: it can then be shown with
    more than 2^31 elements. 0: it is not."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    """What it takes."""
    needs: str = ""
    """A module that does not exist everywhere, and that computes on a GPU only."""
    slack: float = 1.0
    """Roundings to its type on the way, beyond the result's own."""


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight.shape, weight, bias, EPS)


def _targets(rows: Tensor, classes: int) -> Tensor:
    """Of each row, by what is in it: so that some of the rows have the targets that they have among all."""
    return (rows.detach()[:, 0].double() * 1e4).long() % classes


def _losses(compute: Callable[[Tensor, Tensor], Tensor]) -> Function:
    return lambda logits: compute(logits * 1, _targets(logits, logits.shape[1]))[0]


def _head_losses(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain_entropy.plain_cross_entropy(linear(hidden, weight, bias), _targets(hidden, len(weight)))[0]


def _parts(rows: int, experts: int) -> list[int]:
    """Uneven shares of the rows, an empty one among three."""
    return {1: [rows], 2: [rows // 3, rows - rows // 3], 3: [rows // 2, 0, rows - rows // 2]}[experts]


def _residual(
    compute: Callable[..., tuple[Tensor, list[Tensor]]], keep: bool, of_branch: int, of_norms: int
) -> Function:
    """leaves: x, branch (both [T, D]), a bias for each expert of the branch, weights and biases of the norms."""

    def run(x: Tensor, branch: Tensor, *parameters: Tensor) -> list[Tensor]:
        rows = len(x)
        factors = (x.detach()[:, 0] > 0).to(x.dtype) * 1.25 if keep else None
        added, rest = list(parameters[:of_branch]), list(parameters[of_branch:])
        norms = Norms(_parts(rows, of_norms), rest[:of_norms], rest[of_norms:], EPS) if of_norms else None
        r, y = compute(x, Branch(list(branch.split(_parts(rows, of_branch))), added), factors, norms)
        return [r, torch.cat(y)] if y else [r]

    return run


def _residual_norm(keep: bool, of_branch: int, of_norms: int) -> Kernel:
    vectors = of_branch + 2 * of_norms
    return Kernel(
        f"residual{', drop path' * keep} of {of_branch} and norms of {of_norms} experts",
        _residual(residual_norm.residual_norm, keep, of_branch, of_norms),
        _residual(plain_residual_norm, keep, of_branch, of_norms),
        [(TOKENS, WIDTH), (TOKENS, WIDTH), *[(WIDTH,)] * vectors],
        rowwise=2,
        widest=WIDTH if of_branch == of_norms == 1 else 0,
        slack=2,
    )


def _linear_gelu_norm(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return _norm(gelu(linear(x, weight, bias)), gain, shift)


class _Sums(torch.autograd.Function):
    """It only runs within backward passes, and has none itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return sums.column_sums(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.expand(ctx.shape)


LENGTHS = [257, 1, 300, 64, 512, 257 + 33, 88, 3] if ON_GPU else [3, 1, 2]
"""Tokens of the samples that attention sees."""
CUMULATIVE = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)


def _varlen(compute: Callable[[Tensor, Tensor, int], Tensor]) -> Function:
    return lambda qkv: compute(qkv, CUMULATIVE.to(DEVICE), max(LENGTHS))


NARROW = (torch.float16, torch.bfloat16)

KERNELS = [
    Kernel(
        "LayerNorm",
        lambda *t: triton_norm.layer_norm(*t, EPS),
        _norm,
        [(TOKENS, WIDTH), (WIDTH,), (WIDTH,)],
        widest=WIDTH,
    ),
    Kernel(
        "GELU and LayerNorm",
        lambda *t: triton_gelu_norm.gelu_layer_norm(*t, EPS),
        lambda *t: plain_gelu.plain_gelu_layer_norm(*t, EPS),
        [(TOKENS, FFN), (FFN,), (FFN,)],
        widest=FFN,
    ),
    Kernel(
        "GELU and LayerNorm of torch",
        lambda *t: plain_gelu.gelu_layer_norm(*t, EPS),
        lambda *t: plain_gelu.plain_gelu_layer_norm(*t, EPS),
        [(TOKENS, FFN), (FFN,), (FFN,)],
        slack=2,
    ),
    Kernel(
        "cross-entropy",
        _losses(cross_entropy.cross_entropy_in_place),
        _losses(plain_entropy.plain_cross_entropy),
        [(MASKED, CLASSES)],
        widest=CLASSES,
    ),
    Kernel(
        "cross-entropy of torch",
        _losses(plain_entropy.cross_entropy_in_place),
        _losses(plain_entropy.plain_cross_entropy),
        [(MASKED, CLASSES)],
    ),
    Kernel(
        "head and cross-entropy",
        lambda hidden, *head: cross_entropy.head_cross_entropy(hidden, *head, _targets(hidden, len(head[0])))[0],
        _head_losses,
        [(MASKED, WIDTH), (CLASSES, WIDTH), (CLASSES,)],
        widest=CLASSES,
        slack=2,
    ),
    Kernel("sums of columns", _Sums.apply, lambda x: x.sum(0), [(TOKENS, WIDTH)]),
    Kernel(
        "linear and GELU",
        triton_gelu.linear_gelu,
        lambda *t: gelu(linear(*t)),
        [(TOKENS, WIDTH), (FFN, WIDTH), (FFN,)],
        widest=FFN,
        slack=2,
    ),
    Kernel(
        "linear, GELU and LayerNorm",
        lambda *t: triton_gelu_norm.linear_gelu_layer_norm(*t, EPS),
        _linear_gelu_norm,
        [(TOKENS, WIDTH), (FFN, WIDTH), (FFN,), (FFN,), (FFN,)],
        widest=FFN,
        slack=2,
    ),
    *(_residual_norm(keep, b, n) for keep, b, n in ((True, 1, 2), (True, 3, 0), (False, 2, 3), (False, 1, 1))),
    *(
        Kernel(
            f"attention over lengths, {name}",
            _varlen(kernel.compute),
            _varlen(plain_varlen_attention),
            [(sum(LENGTHS), 3, HEADS, HEAD_DIM)],
            dtypes=NARROW,
            needs=kernel.module,
            slack=2,
        )
        for name, kernel in VARLEN_ATTENTION.items()
    ),
]
