"""`precision: fp8`: the blocks' products with both factors in 8 bits, by torchao; all else as in bf16.

Each product scales each of its two matrices as a whole to the range of its type, at every step anew: activations and
weights to e4m3 (4 bits of exponent, 3 of mantissa), gradients to e5m2, sums in fp32. Weights are kept, sent and reduced
in bf16 with fp32 masters; norms, attention's core, embeddings and heads are not touched (Micikevicius et al. 2022).
"""

from __future__ import annotations

from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from beit3_dist.config import TrainingConfig, require
from beit3_dist.kernels.linear import Product
from beit3_dist.kernels.registry import installed

OLDEST_CAPABILITY = (8, 9)
"""Of CUDA devices that multiply in fp8: Ada and Hopper."""
MULTIPLE = 16
"""What the inner and the outer dimensions of a product in fp8 are multiples of."""
TORCHAO = "0.18"
"""The release whose parts are used: some of them it does not call public."""


def check_float8(config: TrainingConfig) -> None:
    """Raises ValueError where the config asks for products in fp8 that cannot be computed."""
    if product_of_blocks(config.precision) is None:
        return
    asked = f"precision={config.precision}"
    require(
        config.parallel.tensor == 1,
        f"{asked} scales every matrix as a whole, of which parallel.tensor={config.parallel.tensor} gives each rank a "
        "part: use parallel.tensor=1 or precision=bf16",
    )
    require(
        config.kernels != "compiled",
        f"{asked} has products that kernels=compiled cannot take into its code: use kernels=auto or precision=bf16",
    )
    for name in ("width", "ffn_width"):
        size = getattr(config.model, name)
        require(
            size % MULTIPLE == 0,
            f"{asked} multiplies matrices whose sides are multiples of {MULTIPLE}, and model.{name}={size} is none: "
            "use precision=bf16",
        )
    require(_torchao().startswith(f"{TORCHAO}."), f"{asked} needs the package torchao {TORCHAO}{_found()}: install it")
    if config.precision == "fp8":
        lacking = "this machine has none"
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            lacking = "" if (major, minor) >= OLDEST_CAPABILITY else f"this one has {major}.{minor}"
        require(
            not lacking,
            f"precision=fp8 needs a CUDA device of capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer "
            f"(H100, L40), and {lacking}: use precision=bf16, or precision=fp8_emulated to see what fp8 would learn",
        )


def _torchao() -> str:
    """The version that is installed; empty: none is."""
    try:
        return version("torchao") if installed("torchao") else ""
    except PackageNotFoundError:
        return ""


def _found() -> str:
    return f", not {_torchao()}" if _torchao() else ""


def product_of_blocks(precision: str) -> Product | None:
    """What multiplies in the projections and the experts of all blocks; None: what multiplies elsewhere, too."""
    emulated = {"fp8": False, "fp8_emulated": True}.get(precision)
    return None if emulated is None else partial(float8_linear, emulated)


def float8_linear(emulated: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b with x and W in fp8. `emulated`: the factors are rounded to fp8 and multiplied in fp32, anywhere."""
    rows = x.flatten(0, -2) if x.dim() != 2 else x
    product = _Product.apply(rows, weight, emulated)
    product = product if bias is None else product + bias
    return product if x.dim() == 2 else product.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """x [T, D], W [F, D] -> x W' [T, F]. What it keeps is the parameter itself, which ZeRO-3 empties in between."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor, emulated: bool) -> Tensor:
        ctx.save_for_backward(x_TD, weight_FD)
        ctx.emulated = emulated
        if not len(x_TD):  # the largest number of none is not defined
            return x_TD.new_empty(0, len(weight_FD))
        x8, weight8 = _cast(x_TD, "input", emulated), _cast(weight_FD, "weight", emulated)
        return torch.mm(x8, weight8.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_TF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight_FD = ctx.saved_tensors
        if not len(x_TD):
            return torch.empty_like(x_TD), torch.zeros_like(weight_FD), None
        gradient8 = _cast(gradient_TF, "grad_output", ctx.emulated)
        x8, weight8 = _cast(x_TD, "input", ctx.emulated), _cast(weight_FD, "weight", ctx.emulated)
        for_x, for_weight, _ = ctx.needs_input_grad
        return (
            torch.mm(gradient8, weight8) if for_x else None,
            torch.mm(gradient8.t(), x8) if for_weight else None,
            None,
        )


def _cast(x: Tensor, role: str, emulated: bool) -> Tensor:
    """x as fp8 numbers and one scale, which torch.mm multiplies as such. `role`: the factor's, in torchao's words."""
    casts, config = _torchao_casts(emulated)
    return casts[role](x.contiguous(), linear_mm_config=config)


@cache
def _torchao_casts(emulated: bool) -> tuple[dict[str, Any], Any]:
    """What casts each of a product's factors, and how torchao is to multiply them: as its recipe `tensorwise`."""
    from torchao.float8.config import Float8LinearConfig, Float8LinearRecipeName
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig, ScaledMMConfig

    recipe = Float8LinearConfig.from_recipe_name(Float8LinearRecipeName.TENSORWISE)
    products = (recipe.gemm_config_output, recipe.gemm_config_grad_input, recipe.gemm_config_grad_weight)
    # Where tokens are no multiple of 16, torchao adds rows of zeros to the factors of a weight's gradient.
    settings = [ScaledMMConfig(emulated, product.use_fast_accum, False, pad_inner_dim=True) for product in products]
    roles = {
        "input": (recipe.cast_config_input, GemmInputRole.INPUT),
        "weight": (recipe.cast_config_weight, GemmInputRole.WEIGHT),
        "grad_output": (recipe.cast_config_grad_output, GemmInputRole.GRAD_OUTPUT),
    }
    # One pass for the largest number and one for the cast, where operations one by one would take five.
    cast = hp_tensor_to_float8_dynamic if emulated else torch.compile(hp_tensor_to_float8_dynamic, dynamic=True)
    casts = {
        role: partial(cast, float8_dtype=as_what.target_dtype, gemm_input_role=gemm_role)
        for role, (as_what, gemm_role) in roles.items()
    }
    return casts, LinearMMConfig(*settings)
