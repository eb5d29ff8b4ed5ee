"""What is special of the Triton kernels, beside their contract (test_kernels.py).

Where there is a GPU they run on it, elsewhere in Triton's interpreter (tests/conftest.py asks for it). What the
interpreter runs the compiler may still refuse, so they are compiled for a Hopper GPU too, which needs none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from beit3_dist.kernels.cross_entropy import triton as cross_entropy
from beit3_dist.kernels.cross_entropy.definition import plain_cross_entropy
from beit3_dist.kernels.cross_entropy.triton import cross_entropy_in_place
from beit3_dist.kernels.gelu_layer_norm.definition import plain_gelu_layer_norm
from beit3_dist.kernels.gelu_layer_norm.triton import gelu_layer_norm
from beit3_dist.kernels.layer_norm import triton as layer_norm_file
from beit3_dist.kernels.layer_norm.definition import plain_layer_norm
from beit3_dist.kernels.layer_norm.triton import layer_norm
from beit3_dist.kernels.registry import Sizes, operations
from tests.kernels import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative, by norms: some tens of fp32 roundings; two of fp16's 11 bits and of bf16's 8 bits."""

Norm = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE)


def assert_near(ours: Tensor, definition: Tensor, tolerance: float) -> None:
    """By norms: single elements may cancel to nearly nothing."""
    assert ours.shape == definition.shape
    assert (ours.double() - definition).norm() <= tolerance * definition.norm()


def test_no_gpu_means_the_interpreter() -> None:
    """Defined before TRITON_INTERPRET was set, the kernels would look for a GPU."""
    assert isinstance(layer_norm_file._forward_kernel, InterpretedFunction) == (DEVICE == "cpu")


# --------------------------------------------------------------------------------------------------------- LayerNorms


NORMS = pytest.mark.parametrize(
    ("norm", "definition"),
    [(layer_norm, plain_layer_norm), (gelu_layer_norm, plain_gelu_layer_norm)],
    ids=["LayerNorm", "GELU and LayerNorm"],
)


def compare(norm: Norm, definition: Norm, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> None:
    """Result and gradients from values that are rounded to `dtype`; weights differ from one, biases from zero."""
    width = x.shape[-1]
    leaves = [x.detach(), 1 + normal(width, seed=1), normal(width, seed=2)]
    results = []
    for function, kind in ((norm, dtype), (definition, torch.float64)):
        inputs = [t.to(dtype).to(kind).requires_grad_() for t in leaves]
        y = function(*inputs, EPS)
        results.append([y, *torch.autograd.grad(y, inputs, gradient.to(dtype).to(kind))])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, exact, TOLERANCE[dtype])


@NORMS
@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 768), (3, 1024), (3, 3072), (3, 4096)], ids=str)
def test_norms_of_more_dimensions_and_of_other_widths_of_the_recipes(
    norm: Norm, definition: Norm, shape: tuple[int, ...]
) -> None:
    compare(norm, definition, normal(*shape), normal(*shape, seed=3), torch.float32)


@NORMS
def test_norms_of_what_is_not_contiguous(norm: Norm, definition: Norm) -> None:
    x, gradient = normal(40, 6).t(), normal(40, 6, seed=3).t()
    compare(norm, definition, x, gradient, torch.float32)


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    """At 1000 fp32 has steps of 6e-5; mean(x^2) - mean(x)^2 would have steps of 0.06."""
    x, one, zero = 1000 + normal(4, 96), torch.ones(96, device=DEVICE), torch.zeros(96, device=DEVICE)
    x = x.float()
    assert_near(layer_norm(x, one, zero, EPS), plain_layer_norm(x.double(), one.double(), zero.double(), EPS), 1e-4)


@NORMS
def test_norms_keep_their_input_alone(norm: Norm, definition: Norm) -> None:
    """The mean and scale of a row, and weights that exist anyway, are all that lives beside it."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        norm(*(t.float().requires_grad_() for t in (normal(7, 24), normal(24), normal(24))), EPS)
    assert sorted(kept) == [7, 7, 24, 7 * 24]


@NORMS
def test_norms_refuse_what_they_would_compute_wrongly(norm: Norm, definition: Norm) -> None:
    with pytest.raises(ValueError, match="x is torch.float64: the Triton kernels take bf16, fp16 and fp32"):
        norm(normal(2, 4), normal(4), normal(4), EPS)
    with pytest.raises(ValueError, match=r"x is 4 wide, but weight has shape \[5\] and bias \[4\]"):
        norm(normal(2, 4).float(), normal(5).float(), normal(4).float(), EPS)


# ------------------------------------------------------------------------------------------------------ cross-entropy


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few classes are several blocks, the last of them not full."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 8)


def losses(logits: list[list[float]], targets: list[int]) -> Tensor:
    return cross_entropy_in_place(torch.tensor(logits, device=DEVICE), torch.tensor(targets, device=DEVICE)).cpu()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_many_blocks(dtype: torch.dtype) -> None:
    operation = operations()["cross_entropy_in_place"]
    check(operation, operation.version("triton"), Sizes(masked=7, classes=29), torch.device(DEVICE), dtype)


@pytest.mark.usefixtures("small_blocks")
def test_of_equal_logits_the_first_is_the_prediction() -> None:
    """Within a block and across blocks."""
    logits = [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert losses([logits] * 4, [0, 1, 2, 9])[1].tolist() == [0, 1, 0, 0]


@pytest.mark.usefixtures("small_blocks")
def test_large_logits_do_not_overflow() -> None:
    """Whether the largest comes in the first block or in the last."""
    small = [-1e4] * 9
    found = losses([[1e4, *small], [*small, 1e4], [-1e4, *small]], [1, 9, 4])
    assert found[0].tolist() == pytest.approx([2e4, 0, 2.3025851])
    assert found[1].tolist() == [0, 1, 0]


@pytest.mark.usefixtures("small_blocks")
def test_classes_that_cannot_be_right() -> None:
    """-inf, as the rows that pad a vocabulary have it, even for a whole block."""
    never = [-float("inf")] * 8
    assert losses([[*never, 0.0, 0.0], [0.0, 0.0, *never]], [9, 0])[0].tolist() == pytest.approx([0.6931472] * 2)


@pytest.mark.parametrize(("logits", "target"), [([float("nan"), 0.0], 1), ([0.0, 0.0], 2), ([0.0, 0.0], -100)])
def test_what_has_no_cross_entropy_is_nan(logits: list[float], target: int) -> None:
    """Training stops on a loss that is not finite; a target outside of the classes must not read someone's memory."""
    assert losses([logits], [target])[0].isnan().all()


def test_no_rows() -> None:
    leaf = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    out = cross_entropy_in_place(leaf * 1, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert out.shape == (2, 0)
    out.sum().backward()
    assert leaf.grad is not None


def test_logits_and_gradients_that_are_not_contiguous() -> None:
    """The gradient of a sum is one number with many addresses."""
    leaf, targets = normal(9, 6).float().requires_grad_(), torch.arange(6, device=DEVICE)
    cross_entropy_in_place((leaf * 1).t(), targets).sum().backward()
    exact = leaf.detach().double().requires_grad_()
    plain_cross_entropy(exact.t(), targets)[0].sum().backward()
    assert_near(leaf.grad, exact.grad, TOLERANCE[torch.float32])


def test_the_gradient_takes_the_logits_place() -> None:
    logits = normal(4, 11).float().requires_grad_() * 1
    loss = cross_entropy_in_place(logits, torch.arange(4, device=DEVICE))[0].sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()


def test_a_second_backward_is_refused() -> None:
    """The gradient has been multiplied already, so a second one would be silently wrong."""
    leaf = normal(2, 3).float().requires_grad_()
    loss = cross_entropy_in_place(leaf * 1, torch.tensor([0, 1], device=DEVICE))[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone backward before"):
        loss.backward()


def test_cross_entropy_refuses_what_it_would_compute_wrongly() -> None:
    with pytest.raises(ValueError, match="logits is torch.float64"):
        cross_entropy_in_place(normal(2, 4), torch.tensor([0, 1], device=DEVICE))
    with pytest.raises(ValueError, match=r"logits have 2 rows, but targets have shape \[3\]"):
        cross_entropy_in_place(normal(2, 4).float(), torch.tensor([0, 1, 2], device=DEVICE))


# ------------------------------------------------------------------------------------------------------ on real chips


@pytest.mark.slow
def test_the_compiler_takes_them(tmp_path: Path) -> None:
    """In a process without the interpreter, into an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_triton_kernels.py")
    done = subprocess.run(
        [sys.executable, program],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [dict(word.split(":") for word in line.split() if "REG:" in word) for line in done.stdout.splitlines()]
    assert len(found) == 26 and all(int(one["REG"].strip(",")) <= 128 for one in found)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU and 5 GB of its memory")
def test_more_logits_than_32_bits_count() -> None:
    rows, classes = 33_600, 64_010
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 5] = 20
    found = cross_entropy_in_place(logits, torch.full((rows,), 5, device=DEVICE))
    assert rows * classes > 1 << 31 and found[1].sum() == 1
    # log(1 + 64,009 exp(-20)) is the difference of two numbers near 20, which fp32 holds in steps of 1.9e-6.
    assert found[0, [0, -1]].tolist() == pytest.approx([11.0667946, 1.3192e-4], rel=1e-5, abs=4e-6)
