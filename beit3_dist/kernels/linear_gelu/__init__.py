"""GELU(x W' + b)."""

from __future__ import annotations

from beit3_dist.kernels.linear_gelu.definition import plain_linear_gelu
from beit3_dist.kernels.registry import Case, Operation, Sizes, register
from beit3_dist.kernels.triton import in_triton


def _cases(sizes: Sizes) -> list[Case]:
    shapes = [(sizes.tokens, sizes.width), (sizes.ffn_width, sizes.width), (sizes.ffn_width,)]
    return [Case(shapes, lambda compute, *leaves: [compute(*leaves)])]


register(Operation("linear_gelu", plain_linear_gelu, _cases, [in_triton(f"{__name__}.triton", 2)]))
