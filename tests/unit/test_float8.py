"""`precision: fp8`: what its products are, what they are near to, and what refuses it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_dist.config import ModelConfig, ParallelConfig, RunConfig
from beit3_dist.kernels.registry import operations
from beit3_dist.model import BEiT3
from beit3_dist.parallel import float8
from beit3_dist.parallel.float8 import check_float8, float8_linear, product_of_blocks
from beit3_dist.parallel.fused import FusedForward, add
from beit3_dist.parallel.kernels import _behind, use_kernels
from beit3_dist.run.computing import computed_by
from tests.parallel.training import run_config
from tests.unit.test_fused_block import CORES, layout

NEAR = 0.08
"""Relative L2 distance of what a product in fp8 gives from the same in fp32. e4m3 rounds each number by 1/16 at most,
e5m2 by 1/8; of normal numbers the root mean square is 0.026 and 0.053, and of a product that of both factors together:
0.037 forward, 0.059 backward."""


def needs_torchao() -> None:
    pytest.importorskip("torchao", reason="needs the package torchao")


def trained(product: Any, x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> list[Tensor]:
    y = product(x, weight, bias)
    return [y, *torch.autograd.grad(y, [x, weight, bias], gradient)]


def leaves(rows: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(rows, 64), (48, 64), (48,)]
    tensors = [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randn(rows, 48, generator=draw).to(dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [7, 33, 48])
def test_it_is_torchaos_product(rows: int, dtype: torch.dtype) -> None:
    """Bit for bit that of its own layer, with any number of rows."""
    needs_torchao()
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    tensors, gradient = leaves(rows, dtype)
    ours = trained(partial(float8_linear, True), *tensors, gradient)
    layer = torch.nn.Linear(64, 48, dtype=dtype)
    layer.weight, layer.bias = (torch.nn.Parameter(t.detach()) for t in tensors[1:])
    model = convert_to_float8_training(torch.nn.Sequential(layer), config=Float8LinearConfig(emulate=True))
    y = model(tensors[0])
    theirs = [y, *torch.autograd.grad(y, [tensors[0], *model.parameters()], gradient)]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype and torch.equal(mine, its)


def test_it_is_near_the_exact_one() -> None:
    needs_torchao()
    tensors, gradient = leaves(640, torch.float32)
    ours = trained(partial(float8_linear, True), *tensors, gradient)
    exact = trained(torch.nn.functional.linear, *tensors, gradient)
    distances = [relative(*pair) for pair in zip(ours, exact, strict=True)]
    assert 0.02 < distances[0] < 0.05 and all(0.03 < distance < NEAR for distance in distances[1:3])
    assert distances[3] < 1e-6, "the bias is not in it"


def test_no_rows_and_samples_in_rows() -> None:
    """An expert without tokens, and the beams of a caption that is written: [B, N, D]."""
    needs_torchao()
    tensors, gradient = leaves(0, torch.bfloat16)
    nothing = trained(partial(float8_linear, True), *tensors, gradient)
    assert nothing[0].shape == (0, 48) and nothing[1].shape == (0, 64) and not nothing[2].any()
    (x, weight, bias), _ = leaves(12, torch.bfloat16)
    joint = float8_linear(True, x.view(3, 4, 64), weight, bias)
    assert torch.equal(joint.flatten(0, 1), float8_linear(True, x, weight, bias))


def test_the_compiled_cast_gives_the_same_numbers() -> None:
    """On a device the casts are compiled; here by the compiler for the CPU."""
    needs_torchao()
    (plain, settings), (compiled, _) = float8._torchao_casts(True), float8._torchao_casts(False)
    for rows in (7, 48):
        x = leaves(rows, torch.bfloat16)[0][0].detach()
        for role in plain:
            ours, theirs = (casts[role](x, linear_mm_config=settings) for casts in (compiled, plain))
            assert torch.equal(ours._data.view(torch.uint8), theirs._data.view(torch.uint8))
            assert torch.equal(ours._scale, theirs._scale)


@pytest.mark.parametrize("rows", [7, 48])
def test_a_device_takes_the_factors(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS wants the first factor by rows, the second by columns, and inner and outer sides that are multiples of 16;
    torch multiplies them on the CPU, too, and gives what the emulation does but for the order of sums."""
    needs_torchao()
    (casts, _), (_, settings) = float8._torchao_casts(True), float8._torchao_casts(False)
    monkeypatch.setattr(float8, "_torchao_casts", lambda emulated: (casts, settings))  # nothing is compiled for it
    multiply, calls = torch._scaled_mm, []

    def spied(a: Tensor, b: Tensor, **rest: Any) -> Tensor:
        calls.append(a.dtype)
        assert a.is_contiguous() and b.t().is_contiguous() and a.dtype.itemsize == b.dtype.itemsize == 1
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
        return multiply(a, b, **rest)

    monkeypatch.setattr(torch, "_scaled_mm", spied)
    tensors, gradient = leaves(rows, torch.bfloat16)
    ours = trained(partial(float8_linear, False), *tensors, gradient)
    monkeypatch.undo()
    assert calls == [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e5m2]
    for real, emulated in zip(ours, trained(partial(float8_linear, True), *tensors, gradient), strict=True):
        assert relative(real, emulated) < 4e-3


# --------------------------------------------------------------------------------------------------------- whole blocks


def small_model(attention: str) -> BEiT3:
    config = ModelConfig(
        layers=2, width=32, heads=2, ffn_width=64, patch_size=2, image_size=4, attention=attention,
        sub_layernorm=attention == "per_modality", vl_expert_layers=1, vocab_size=20, visual_vocab_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BEiT3(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def block_results(model: BEiT3, forward: Any) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(37, 32, generator=draw, requires_grad=True)
    y = add(forward(x, layout(), None), operations()["residual_norm"].definition)
    block = model.blocks["1"]
    return [y, *torch.autograd.grad(y, [x, *block.parameters()], torch.randn(37, 32, generator=draw))]


@pytest.mark.parametrize("attention", ["shared", "per_modality"])
def test_blocks_stay_near(attention: str) -> None:
    """Plain blocks, and those of joined operations with either core of attention, whose q, k and v share a scale."""
    needs_torchao()
    exact = small_model(attention)
    theirs = block_results(exact, exact.blocks["1"])
    product = product_of_blocks("fp8_emulated")
    plain = small_model(attention)
    use_kernels(plain, "torch", product=product)
    kernels = {name: operation.definition for name, operation in operations().items()}
    kernels |= _behind(product, kernels["gelu_layer_norm"])
    forwards = [plain.blocks["1"], *(FusedForward(plain.blocks["1"], kernels, core, product) for core in CORES)]
    largest = max(t.norm() for t in theirs[2:])
    for forward in forwards:
        ours = block_results(plain, forward)
        distances = [
            float((mine - its).norm() / max(its.norm(), 0.1 * largest)) for mine, its in zip(ours, theirs, strict=True)
        ]
        assert max(distances) < 3 * NEAR and distances[0] > 1e-3, "products one after the other"


# ------------------------------------------------------------------------------------------------------------- refusals


def run(precision: str = "fp8_emulated", **changes: Any) -> RunConfig:
    config = run_config("paper", zero_stage=1, accumulation=1, data_parallel=1, precision=precision)
    return replace(config, **changes)


def refusal(config: RunConfig) -> str:
    with pytest.raises(ValueError) as refused:
        check_float8(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_cannot_be_computed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "_torchao", lambda: "0.18.2")
    check_float8(run())
    for precision in ("bf16", "fp32"):
        check_float8(run(precision, parallel=ParallelConfig(tensor=2), kernels="compiled"))
    assert "use parallel.tensor=1" in refusal(run(parallel=ParallelConfig(tensor=2)))
    assert "use kernels=auto" in refusal(run(kernels="compiled"))
    assert "model.ffn_width=72 is none: use precision=bf16" in refusal(run(model=replace(run().model, ffn_width=72)))
    assert "precision=fp8 needs a CUDA device of capability 8.9" in refusal(run("fp8"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, refused in (((8, 0), True), ((8, 9), False), ((9, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if refused:
            assert "this one has 8.0: use precision=bf16" in refusal(run("fp8"))
        else:
            check_float8(run("fp8"))
    monkeypatch.setattr(float8, "_torchao", lambda: "0.19.0")
    assert "needs the package torchao 0.18, not 0.19.0: install it" in refusal(run())
    monkeypatch.setattr(float8, "_torchao", lambda: "")
    assert "needs the package torchao 0.18: install it" in refusal(run())


def test_the_log_names_it() -> None:
    assert ", fp8_emulated, kernels torch" in computed_by(run(kernels="torch"), torch.device("cpu"))
