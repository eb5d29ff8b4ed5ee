"""Who computes what: `kernels` and `attention_kernel` of the config, applied in one place, operation by operation."""

from __future__ import annotations

import os
import shutil
from functools import partial
from typing import Any

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig, require
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear, Product
from beit3_dist.kernels.linear_gelu.definition import plain_linear_gelu
from beit3_dist.kernels.registry import Function, Place, Sizes, Version, operations
from beit3_dist.kernels.triton import lacks as triton_lacks
from beit3_dist.kernels.varlen_attention import VARLEN_ATTENTION
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.block import Block
from beit3_dist.model.head import Head
from beit3_dist.parallel.fused import FusedForward, Unadded, add

OLDEST_TORCH = (2, 10)
"""For compiled blocks: the first whose compiler takes all that parallel/compiled.py asks of it (a typical length for
dimensions that are unknown, kernels that no timing chooses, 32-bit indexes)."""


def _device() -> str:
    """This process's."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _triton_lacks() -> str:
    """What is missing for the kernels in Triton, in words."""
    return triton_lacks(Place(_device(), torch.float32, 0))


def chosen_kernels(choice: str) -> str:
    """Who computes, where `kernels` leaves it open: on CUDA what was fastest there, on the CPU torch."""
    if choice != "auto":
        return choice
    return "triton" if torch.cuda.is_available() and not _triton_lacks() else "torch"


def chosen_versions(kernels: str, dtype: torch.dtype, sizes: Sizes) -> dict[str, Version]:
    """Of each operation the preferred version among those that `kernels` (as chosen) may mean and that may serve; none
    where it is computed by its definition."""
    chosen = {}
    for name, operation in operations().items():
        serving = operation.serving(operation.cases(sizes)[0].place(_device(), dtype), kernels)
        if serving:
            chosen[name] = serving[0]
    return chosen


def sizes_of(model: ModelConfig) -> Sizes:
    """What its operations take."""
    return Sizes(width=model.width, ffn_width=model.ffn_width, heads=model.heads, classes=model.vocab_size)


def chosen_function(operation: str, kernels: str, dtype: torch.dtype, sizes: Sizes) -> Function | None:
    """What computes one operation by `kernels` (of the config); None: its definition, or torch."""
    version = chosen_versions(chosen_kernels(kernels), dtype, sizes).get(operation)
    return None if version is None else operations()[operation].function(version)


def chosen_attention(choice: str, kernels: str, dtype: torch.dtype, head_dim: int) -> str:
    """Who computes attention's core, where `attention_kernel` leaves it open. `kernels`: as chosen."""
    if choice != "auto":
        return choice
    serving = VARLEN_ATTENTION.serving(Place(_device(), dtype, head_dim)) if kernels == "triton" else []
    return serving[0].name if serving else "padded"


def check_kernels(kernels: str, attention: str = "auto", precision: str = "bf16") -> None:
    """Raises ValueError where the choice cannot run on this machine."""
    if kernels == "compiled":
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        require(
            version >= OLDEST_TORCH,
            f"kernels=compiled needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, not {torch.__version__}: "
            "use kernels=torch",
        )
        compiler = os.environ.get("CXX", "g++")  # what torch.compile calls
        require(
            shutil.which(compiler) is not None,
            f"kernels=compiled needs a C++ compiler, and {compiler} is not found: install g++, name another in the "
            "environment's CXX, or use kernels=torch",
        )
    if kernels == "triton":
        lacking = _triton_lacks()
        require(not lacking, f"kernels=triton needs {lacking}: use kernels=torch")
    if attention not in ("auto", "padded"):
        require(
            chosen_kernels(kernels) == "triton" and precision != "fp32" and torch.cuda.is_available(),
            f"attention_kernel={attention} needs kernels=triton, precision=bf16 or fp8 and a CUDA device: use "
            "attention_kernel=padded",
        )
        lacking = VARLEN_ATTENTION.version(attention).lacks(Place(_device(), torch.bfloat16, 0))
        require(not lacking, f"attention_kernel={attention} needs {lacking}: use attention_kernel=auto")


def use_kernels(model: BEiT3, choice: str, attention: str = "auto", product: Product | None = None) -> None:
    """Makes the model compute by `kernels` and `attention_kernel`. `product`: what multiplies in the blocks instead of
    their layers' own. Call it once the model is cut to the rank's parts and stages."""
    kernels, dtype, known = chosen_kernels(choice), next(model.parameters()).dtype, operations()
    chosen = chosen_versions(kernels, dtype, sizes_of(model.config))
    functions = {name: known[name].function(version) for name, version in chosen.items()}
    for module in model.modules():
        if isinstance(module, (LayerNorm, Linear)) and module.operation in functions:
            module.compute = functions[module.operation]
        elif type(module) is Head and "head_cross_entropy" in functions:
            module.forward = partial(_head_losses, module, functions["head_cross_entropy"])  # type: ignore[method-assign]
        elif isinstance(module, Head) and "cross_entropy_in_place" in functions:
            module.loss = functions["cross_entropy_in_place"]
    if product is not None:
        for module in model.blocks.modules():
            if isinstance(module, Linear):
                module.compute = product
    if kernels == "compiled":
        from beit3_dist.parallel.compiled import CompiledForward  # needs a newer torch than all else

        for block in model.blocks.values():
            # Layers of fusion, and those with norms behind, are other arithmetic: they stay as they are.
            if type(block) is Block and not block.behind:
                block.forward = CompiledForward(block)  # type: ignore[method-assign]
    elif kernels == "triton" and not model.config.fusion_layers:
        head_dim = model.config.width // model.config.heads
        attention, varlen = chosen_attention(attention, kernels, dtype, head_dim), VARLEN_ATTENTION
        core = None if attention == "padded" else varlen.function(varlen.version(attention))
        of_blocks = {name: operation.definition for name, operation in known.items()} | functions
        if product is not None:
            of_blocks |= _behind(product, of_blocks["gelu_layer_norm"])
        for block in model.blocks.values():
            assert isinstance(block, Block)
            if all(type(projection) is Linear for projection in block.attention.out.values()):  # else it is cut
                block.forward = FusedForward(block, of_blocks, core, product)  # type: ignore[method-assign, assignment]
                model.blocks.leave = partial(_add_last, of_blocks["residual_norm"])


def _behind(product: Product, gelu_layer_norm: Function) -> dict[str, Function]:
    """The operations that begin with a product, by another one."""

    def linear_gelu_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *norm: Any) -> Tensor:
        return gelu_layer_norm(product(x, weight, bias), *norm)

    return {
        "linear_gelu": partial(plain_linear_gelu, product=product),
        "linear_gelu_layer_norm": linear_gelu_layer_norm,
    }


def _head_losses(head: Head, compute: Function, hidden_MD: Tensor, targets: Tensor | None = None) -> Tensor:
    """`Head.forward`."""
    if targets is None:
        return head.logits(hidden_MD)
    return compute(hidden_MD, head.weight, head.bias, targets)


def _add_last(residual_norm: Function, x: Tensor | Unadded, layout: object) -> Tensor:
    """`Encoder.leave` behind fused blocks."""
    return add(x, residual_norm)
