"""Compiles the Triton kernels for a Hopper GPU, ahead of time and on any machine. A program of its own because a
process either compiles or interprets.

It prints the size of each, its registers for a thread and the bytes that it spills; test_triton_kernels.py starts it.
"""

from __future__ import annotations

import inspect
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from beit3_dist.kernels.adamw import triton as adamw
from beit3_dist.kernels.cross_entropy import triton as cross_entropy
from beit3_dist.kernels.layer_norm import triton as layer_norm
from beit3_dist.kernels.linear_gelu import triton as gelu
from beit3_dist.kernels.residual_norm import triton as residual_norm
from beit3_dist.kernels.triton import sums
from beit3_dist.kernels.triton.launch import backward_shape, forward_shape

TARGET = GPUTarget("cuda", 90, 32)
TYPES = dict.fromkeys(
    ("targets_ptr", "place_ptr", "address_ptr", "parameter_ptr", "begin_ptr", "start_ptr", "size_ptr"), "*i64"
) | dict.fromkeys(
    ("mean_ptr", "scale_ptr", "partial_ptr", "factor_ptr", "masters_ptr", "first_ptr", "second_ptr"), "*fp32"
)
"""Of arguments that are not matrices in bf16."""
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def type_of(name: str, annotation: Any) -> str:
    """In Triton's words."""
    return {"int": "i32", "float": "fp32"}.get(annotation, TYPES.get(name, "*bf16"))


def resources(code: bytes) -> str:
    """What the disassembler says of a kernel: REG:..., STACK:... (bytes that are spilled)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        said = subprocess.run(
            [BINARIES / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    words = said.stdout.split()
    return ", ".join(word for word in words if word.startswith(("REG:", "STACK:", "LOCAL:")))


def compile_kernel(kernel: Any, options: dict[str, Any], others: Sequence[str] = (), **constants: Any) -> None:
    """others: arguments that are in fp32, beside the usual ones."""
    annotations = inspect.get_annotations(kernel.fn)
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: type_of(name, annotations[name]) for name in names} | dict.fromkeys(others, "*fp32")
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
            for name, kind in types.items()
            if kind.startswith("*")
        },
    )
    code = triton.compile(source, target=TARGET, options=options).asm["cubin"]
    name = f"{kernel.fn.__module__.removeprefix('beit3_dist.kernels.')}.{kernel.__name__}"
    print(f"{name} {constants}: {len(code)} bytes of machine code, {resources(code)}", flush=True)


def forward(width: int) -> dict[str, Any]:
    return {"num_warps": forward_shape(width).warps}


def backward(width: int) -> dict[str, Any]:
    shape = backward_shape(width)
    return {"num_warps": shape.warps, "maxnreg": shape.registers}


if __name__ == "__main__":
    for width in (1408, 6144):
        for of_gelu in (False, True):
            flags = {"WIDTH": width, "BLOCK": forward_shape(width).block, "GELU": of_gelu}
            compile_kernel(layer_norm._forward_kernel, forward(width), **flags)
            compile_kernel(layer_norm._backward_kernel, backward(width), KINDS=3 if of_gelu else 2, **flags)
    for branch, keep, norm, place in ((False, 0, True, 2), (True, 1, True, 1), (True, 2, True, 2), (True, 2, False, 0)):
        flags = {"WIDTH": 1408, "BLOCK": 2048, "BRANCH": branch, "KEEP": keep, "NORM": norm, "PLACE": place}
        compile_kernel(residual_norm._forward_kernel, forward(1408), **flags)
        compile_kernel(residual_norm._backward_kernel, backward(1408), **flags)
    # The image tokenizer's: all in fp32 but the branch and y.
    vectors = [f"{name}{number}" for name in ("added", "weight", "bias") for number in range(residual_norm.SEGMENTS)]
    flags = {"WIDTH": 768, "BLOCK": 1024, "BRANCH": True, "KEEP": 0, "NORM": True, "PLACE": 0}
    compile_kernel(residual_norm._forward_kernel, forward(768), ["x_ptr", "r_ptr", *vectors], **flags)
    block = {"WIDTH": 6144, "ROWS": gelu.ROWS, "COLUMNS": sums.STRIPE_COLUMNS}
    compile_kernel(gelu._forward_kernel, {}, **block, STRIPES=12)
    compile_kernel(gelu._backward_kernel, {}, **block, KEEP=True)
    for width, stride, factors in ((1408, 4224, False), (64064, 64064, True)):
        block = {"ROWS": sums.STRIPE_ROWS, "COLUMNS": sums.STRIPE_COLUMNS}
        compile_kernel(sums._columns_kernel, {}, WIDTH=width, STRIDE=stride, FACTORS=factors, **block)
    compile_kernel(sums._sum_kernel, {}, KINDS=3, WIDTH=1408, ROWS=sums.ROWS, COLUMNS=sums.COLUMNS)
    for gradient in (triton.language.bfloat16, triton.language.float32):
        shape = {"CHUNK": adamw.CHUNK, "BLOCK": adamw.BLOCK, "ALIGNED": adamw.ALIGNED}
        compile_kernel(adamw._step_kernel, {}, GRADIENT=gradient, **shape)
    options = {"num_warps": cross_entropy.WARPS}
    shape = {"CLASSES": 64010, "STRIDE": 64064, "BLOCK": cross_entropy.BLOCK}
    compile_kernel(cross_entropy._forward_kernel, options, ["out_ptr"], **shape, BIAS=True)
    compile_kernel(cross_entropy._scale_kernel, options, **shape)
