"""LayerNorm(GELU(x)), also behind the linear layer before it."""

from __future__ import annotations

from beit3_dist.kernels.gelu_layer_norm.definition import plain_gelu_layer_norm, plain_linear_gelu_layer_norm
from beit3_dist.kernels.gelu_layer_norm.recomputed import gelu_layer_norm
from beit3_dist.kernels.layer_norm import EPS, LayerNorm
from beit3_dist.kernels.registry import Case, Operation, Sizes, Version, register
from beit3_dist.kernels.triton import in_triton


class GeluLayerNorm(LayerNorm):
    """A LayerNorm whose input is the one of the GELU before it."""

    operation = "gelu_layer_norm"
    compute = staticmethod(gelu_layer_norm)


def _cases(sizes: Sizes) -> list[Case]:
    width = sizes.ffn_width
    return [Case([(sizes.tokens, width), (width,), (width,)], lambda compute, *leaves: [compute(*leaves, EPS)])]


def _linear_cases(sizes: Sizes) -> list[Case]:
    inner = sizes.ffn_width
    shapes = [(sizes.tokens, sizes.width), (inner, sizes.width), (inner,), (inner,), (inner,)]
    return [Case(shapes, lambda compute, *leaves: [compute(*leaves, EPS)])]


_TRITON = f"{__name__}.triton"
_RECOMPUTED = Version("torch", f"{__name__}.recomputed", ("torch", "compiled"), roundings=2)  # GELU's result is rounded
register(Operation("gelu_layer_norm", plain_gelu_layer_norm, _cases, [in_triton(_TRITON), _RECOMPUTED]))
register(Operation("linear_gelu_layer_norm", plain_linear_gelu_layer_norm, _linear_cases, [in_triton(_TRITON, 2)]))
