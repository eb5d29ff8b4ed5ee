"""Compiles the Triton kernels for a Hopper GPU, ahead of time and on any machine. A program of its own because a
process either compiles or interprets.

It prints the size of each; test_triton_kernels.py starts it.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from beit3_dist.kernels.triton import cross_entropy, layer_norm
from beit3_dist.kernels.triton.launch import REGISTERS, block_and_warps

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {"eps": "fp32", "rows": "i32", "targets_ptr": "*i64"}
"""Of arguments that are not matrices in bf16."""
FP32 = ("mean_ptr", "scale_ptr", "partial_ptr", "out_ptr", "factor_ptr")


def compile_kernel(kernel: Any, options: dict[str, int], **constants: Any) -> None:
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: TYPES.get(name, "*fp32" if name in FP32 else "*bf16") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")},
    )
    code = triton.compile(source, target=TARGET, options=options).asm["cubin"]
    print(f"{kernel.__name__} {constants}: {len(code)} bytes of machine code")


if __name__ == "__main__":
    for width in (1408, 6144):
        block, warps = block_and_warps(width)
        options = {"num_warps": warps}
        for gelu in (False, True):
            compile_kernel(layer_norm._forward_kernel, options, WIDTH=width, BLOCK=block, GELU=gelu)
            compile_kernel(
                layer_norm._backward_kernel, options | {"maxnreg": REGISTERS}, WIDTH=width, BLOCK=block, GELU=gelu
            )
    options = {"num_warps": cross_entropy.WARPS}
    for kernel in (cross_entropy._forward_kernel, cross_entropy._scale_kernel):
        compile_kernel(kernel, options, CLASSES=64010, BLOCK=cross_entropy.BLOCK)
