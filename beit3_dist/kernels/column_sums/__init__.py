"""Sums over rows. They are computed within backward passes alone, and have no gradients themselves."""

from __future__ import annotations

from torch import Tensor

from beit3_dist.kernels.column_sums.definition import plain_column_sums
from beit3_dist.kernels.registry import Case, Function, Operation, Sizes, register
from beit3_dist.kernels.triton import in_triton


def _of_apart_rows(compute: Function, x: Tensor, factors: Tensor) -> list[Tensor]:
    x, factors = x.detach(), factors.detach()
    return [compute(x[:, : (x.shape[1] + 1) // 2], factors)]


def _cases(sizes: Sizes) -> list[Case]:
    matrix, factors = (sizes.tokens, sizes.width), (sizes.tokens,)
    return [
        Case([matrix], lambda compute, x: [compute(x.detach())], separate=False),
        Case([matrix, factors], _of_apart_rows, "rows apart, with factors", rowwise=2, separate=False),
    ]


register(Operation("column_sums", plain_column_sums, _cases, [in_triton("beit3_dist.kernels.triton.sums")]))
