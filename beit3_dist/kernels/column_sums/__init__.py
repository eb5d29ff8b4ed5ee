"""Sums over rows. They are computed within backward passes alone, and have no gradients themselves."""

from __future__ import annotations

from beit3_dist.kernels.column_sums.definition import plain_column_sums
from beit3_dist.kernels.registry import Case, Operation, Sizes, register
from beit3_dist.kernels.triton import in_triton


def _cases(sizes: Sizes) -> list[Case]:
    return [Case([(sizes.tokens, sizes.width)], lambda compute, x: [compute(x.detach())], separate=False)]


register(Operation("column_sums", plain_column_sums, _cases, [in_triton("beit3_dist.kernels.triton.sums")]))
