"""LayerNorm."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from beit3_dist.kernels.layer_norm import apex
from beit3_dist.kernels.layer_norm.definition import plain_layer_norm
from beit3_dist.kernels.registry import Case, Operation, Place, Sizes, Version, register
from beit3_dist.kernels.triton import in_triton

EPS = 1e-5


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm. `compute` may be replaced by another version of `operation`."""

    operation = "layer_norm"
    compute: Callable[[Tensor, Tensor, Tensor, float], Tensor] = staticmethod(apex.layer_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight, self.bias, self.eps)


def _lacks_apex(place: Place) -> str:
    if place.device != "cuda":
        return "a CUDA device"
    return "" if apex.apex_layer_norm() else "NVIDIA's Apex, built with its CUDA kernels"


def _cases(sizes: Sizes) -> list[Case]:
    width = sizes.width
    return [Case([(sizes.tokens, width), (width,), (width,)], lambda compute, *leaves: [compute(*leaves, EPS)])]


register(
    Operation(
        "layer_norm",
        plain_layer_norm,
        _cases,
        [in_triton(f"{__name__}.triton"), Version("apex", apex.__name__, ("torch", "compiled"), _lacks_apex)],
    )
)
