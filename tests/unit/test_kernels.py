"""Every version of every operation against its definition, and what is special of those in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from beit3_dist.kernels.cross_entropy import in_place
from beit3_dist.kernels.cross_entropy.definition import plain_cross_entropy
from beit3_dist.kernels.cross_entropy.in_place import cross_entropy_in_place
from beit3_dist.kernels.gelu_layer_norm import GeluLayerNorm
from beit3_dist.kernels.gelu_layer_norm.recomputed import gelu_layer_norm
from beit3_dist.kernels.registry import Operation, Sizes, Version, operations
from tests.kernels import TOLERANCE, check, versions

SIZES = {
    "odd widths": Sizes(tokens=21, width=21, ffn_width=37, heads=3, masked=7, classes=29),
    "one row": Sizes(tokens=1, width=24, ffn_width=40, heads=3, masked=1, classes=64),
    "no rows": Sizes(tokens=0, width=24, ffn_width=40, heads=3, masked=0, classes=70),
    "narrow": Sizes(tokens=5, width=3, ffn_width=7, heads=1, masked=7, classes=3),
    "the giant's widths": Sizes(tokens=2, width=1408, ffn_width=6144, heads=16, masked=2, classes=10_001),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("operation", "version", "dtype"), versions())
def test_versions_equal_their_definitions(
    operation: Operation, version: Version, dtype: torch.dtype, sizes: str
) -> None:
    check(operation, version, SIZES[sizes], torch.device("cpu"), dtype)


EPS = 1e-5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- GELU and LayerNorm


def test_gelu_layer_norms_gradient_by_differences() -> None:
    leaves = [normal(3, 5), 1 + normal(5, seed=1), normal(5, seed=2)]
    assert gradcheck(lambda *tensors: gelu_layer_norm(*tensors, EPS), [t.requires_grad_() for t in leaves])


def test_gelu_layer_norm_of_no_rows() -> None:
    """An expert without tokens runs too, and its gradients are zeros."""
    norm = GeluLayerNorm(6, EPS)
    norm(torch.zeros(0, 6, requires_grad=True)).sum().backward()
    assert not norm.weight.grad.any() and not norm.bias.grad.any()


def test_gelu_layer_norm_keeps_its_input_alone() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gelu_layer_norm(normal(7, 24).requires_grad_(), normal(24).requires_grad_(), normal(24).requires_grad_(), EPS)
    assert sorted(kept) == [7, 7, 24, 24, 7 * 24]


# ------------------------------------------------------------------------------------------------------ cross-entropy


@pytest.fixture(params=[1 << 24, 60], ids=["one chunk", "two rows a chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cross_entropy_in_chunks(dtype: torch.dtype) -> None:
    operation = operations()["cross_entropy_in_place"]
    check(operation, operation.version("torch"), Sizes(masked=7, classes=30), torch.device("cpu"), dtype)


@pytest.mark.usefixtures("chunk")
def test_cross_entropy_learns_from_targets_that_are_nearly_certain() -> None:
    """Each row by itself: bf16 has no number between 0.996 and 1, yet such a target has a gradient.
    A bf16 rounding is 2^-9; that of the share in fp32 is 2^-25, 2^-13 of the distance from 1 in the last row."""
    logits, targets = normal(7, 30), torch.arange(7)
    logits[range(7), targets] = torch.linspace(4, 12, 7, dtype=torch.float64)  # shares of 0.6 to 0.9997
    leaf = logits.bfloat16().requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    cross_entropy_in_place(leaf * 1, targets)[0].sum().backward()
    plain_cross_entropy(exact, targets)[0].sum().backward()
    assert torch.allclose(leaf.grad.double(), exact.grad, rtol=2**-8, atol=0)


@pytest.mark.usefixtures("chunk")
def test_cross_entropys_gradient_by_differences() -> None:
    targets, logits, step = torch.tensor([2, 0, 4]), normal(3, 5).requires_grad_(), 1e-6
    cross_entropy_in_place(logits * 1, targets)[0].sum().backward()
    for column in range(5):
        moved = step * torch.eye(5, dtype=torch.float64)[column]
        ahead, behind = (cross_entropy_in_place(logits.detach() + s * moved, targets)[0] for s in (1, -1))
        assert torch.allclose((ahead - behind) / (2 * step), logits.grad[:, column], rtol=0, atol=1e-8)


def test_of_equal_logits_the_first_is_the_prediction() -> None:
    targets = torch.tensor([0, 1])
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert cross_entropy_in_place(logits.clone(), targets)[1].tolist() == [1, 0]
    assert plain_cross_entropy(logits, targets)[1].tolist() == [1, 0]


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    losses = cross_entropy_in_place(logits, torch.tensor([1, 2]))[0]
    assert losses.tolist() == pytest.approx([2e4, 1.0986123])


def test_no_rows() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    out = cross_entropy_in_place(logits * 1, torch.zeros(0, dtype=torch.int64))
    assert out.shape == (2, 0)
    out.sum().backward()
    assert logits.grad is not None


def test_a_second_backward_is_refused() -> None:
    """The gradient has taken its factor, so a second one would be silently wrong."""
    leaf = normal(2, 3).requires_grad_()
    loss = cross_entropy_in_place(leaf * 1, torch.tensor([0, 1]))[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone backward before"):
        loss.backward()
