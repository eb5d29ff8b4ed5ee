"""GELU(x W' + b)."""

from __future__ import annotations

from torch import Tensor

from beit3_dist.kernels.linear_gelu.definition import plain_linear_gelu
from beit3_dist.kernels.registry import Case, Function, Operation, Sizes, register
from beit3_dist.kernels.triton import in_triton


def _with_factors(compute: Function, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [compute(x, weight, bias, (x.detach()[:, 0] > 0).to(x.dtype) * 1.25)]


def _cases(sizes: Sizes) -> list[Case]:
    shapes = [(sizes.tokens, sizes.width), (sizes.ffn_width, sizes.width), (sizes.ffn_width,)]
    return [Case(shapes, lambda compute, *leaves: [compute(*leaves)]), Case(shapes, _with_factors, "drop path")]


register(Operation("linear_gelu", plain_linear_gelu, _cases, [in_triton(f"{__name__}.triton", 2)]))
