"""The fused kernels against their definitions in fp64, and blocks that they compute against plain ones."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.kernels.cross_entropy import triton as cross_entropy
from beit3_dist.kernels.cross_entropy.definition import plain_cross_entropy
from beit3_dist.kernels.gelu_layer_norm.triton import linear_gelu_layer_norm
from beit3_dist.kernels.linear_gelu.triton import linear_gelu
from beit3_dist.kernels.residual_norm import triton as residual_norm
from beit3_dist.kernels.residual_norm.definition import Branch, Norms, plain_residual_norm
from beit3_dist.kernels.triton import launch, sums
from beit3_dist.kernels.varlen_attention.definition import VarlenAttention, plain_varlen_attention
from beit3_dist.model import BEiT3
from beit3_dist.model.layout import Layout, Selection, group
from beit3_dist.parallel.fused import FusedForward
from beit3_dist.parallel.kernels import use_kernels
from tests.unit.test_triton_kernels import DEVICE, EPS, TOLERANCE, assert_near, normal

# ------------------------------------------------------------------------------------------------- kernels, one by one

PARTITIONS = {  # tokens of the experts that made the branch, and of those whose norms come
    "norm alone": (None, [7]),
    "norms alone": (None, [4, 3]),
    "one branch, no norm": ([7], None),
    "three branches, no norm": ([2, 4, 1], None),
    "shared attention, two experts": ([9], [5, 4]),
    "shared attention, three experts": ([9], [3, 4, 2]),
    "attention of modalities, three experts": ([6, 5], [2, 7, 2]),
    "an expert without tokens": ([0, 5], [0, 5, 0]),
    "no tokens": ([0, 0], [0, 0, 0]),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("keep", [False, True], ids=["", "drop path"])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_residual_and_norm(partition: str, keep: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    of_branch, of_norms = PARTITIONS[partition]
    check_residual_norm(of_branch, of_norms, keep and of_branch is not None, dtype, None)


@pytest.mark.parametrize(("of_branch", "of_norms"), [([7], [7]), ([7], [3, 4]), (None, [7]), ([7], None)], ids=str)
def test_residual_and_norm_of_tokens_in_another_order(of_branch: list[int] | None, of_norms: list[int] | None) -> None:
    check_residual_norm(of_branch, of_norms, of_branch is not None, torch.float32, [3, 0, 6, 1, 2, 5, 4])


def test_residual_and_norm_with_many_programs_of_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 3)
    monkeypatch.setattr(sums, "ROWS", 4)
    check_residual_norm([40], [7, 30, 3], True, torch.float32, None)


def check_residual_norm(
    of_branch: list[int] | None, of_norms: list[int] | None, keep: bool, dtype: torch.dtype, place: list[int] | None
) -> None:
    rows, width = sum(of_branch or of_norms or []), 24
    factors = (torch.arange(rows) % 3).to(dtype).to(DEVICE) if keep else None
    places = None if place is None else torch.tensor(place, device=DEVICE)
    x = normal(rows, width)
    parts = [normal(n, width, seed=1 + n) for n in of_branch or []]
    added = [normal(width, seed=10 + i) for i in range(len(parts))]
    weights = [1 + normal(width, seed=20 + i) for i in range(len(of_norms or []))]
    biases = [normal(width, seed=30 + i) for i in range(len(weights))]
    gradients = [normal(rows, width, seed=40), *(normal(n, width, seed=41 + i) for i, n in enumerate(of_norms or []))]
    results = []
    for function, kind in ((residual_norm.residual_norm, dtype), (plain_residual_norm, torch.float64)):
        leaves = [t.to(dtype).to(kind).requires_grad_() for t in (x, *parts, *added, *weights, *biases)]
        n, m = len(parts), len(weights)
        branch = Branch(leaves[1 : 1 + n], leaves[1 + n : 1 + 2 * n]) if n else None
        norms = Norms(of_norms or [], leaves[1 + 2 * n :][:m], leaves[1 + 2 * n :][m:], EPS) if m else None
        r, y = function(leaves[0], branch, None if factors is None else factors.to(kind), norms, places)
        # a mixture, so that the gradient of what is read twice is not the one of r alone
        outputs, given = [r, *y], [g.to(dtype).to(kind) for g in gradients]
        results.append([r, *y, *torch.autograd.grad(outputs, leaves, given)])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, exact, 2 * TOLERANCE[dtype])  # r is rounded before its norm is taken


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norms_of_gathered_tokens(dtype: torch.dtype) -> None:
    place, sizes = torch.tensor([3, 0, 6, 1, 2, 5, 4], device=DEVICE), [4, 3]
    leaves = [normal(7, 24), *(1 + normal(24, seed=i) for i in (1, 2)), *(normal(24, seed=i) for i in (3, 4))]
    results = []
    for kind in (dtype, torch.float64):
        x, *affine = inputs = [t.to(dtype).to(kind).requires_grad_() for t in leaves]
        norms = Norms(sizes, affine[:2], affine[2:], EPS)
        if kind == dtype:
            y = residual_norm.gathered_norm(x, place, norms)
        else:
            y = plain_residual_norm(x[place], None, None, norms)[1]
        gradients = [normal(n, 24, seed=5 + n).to(dtype).to(kind) for n in sizes]
        results.append([*y, *torch.autograd.grad(y, inputs, gradients)])
    for ours, exact in zip(*results, strict=True):
        assert_near(ours, exact, TOLERANCE[dtype])


def test_tokens_in_another_order_have_one_expert() -> None:
    x = normal(2, 4).float()
    norms = Norms([1, 1], [x[0], x[0]], [x[0], x[0]], EPS)
    with pytest.raises(ValueError, match="must belong to one expert"):
        residual_norm.residual_norm(x, None, None, norms, torch.arange(2, device=DEVICE))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("sub_norm", [False, True])
def test_linear_and_gelu(sub_norm: bool, rows: int, dtype: torch.dtype) -> None:
    leaves = [normal(rows, 5), normal(12, 5, seed=1), normal(12, seed=2)]
    if sub_norm:
        leaves += [1 + normal(12, seed=3), normal(12, seed=4)]
    results = []
    for kind in (dtype, torch.float64):
        inputs = [t.to(dtype).to(kind).requires_grad_() for t in leaves]
        if kind == dtype:
            y = linear_gelu_layer_norm(*inputs, EPS) if sub_norm else linear_gelu(*inputs)
        else:
            hidden = torch.nn.functional.gelu(torch.nn.functional.linear(*inputs[:3]))
            y = torch.nn.functional.layer_norm(hidden, (12,), *inputs[3:], EPS) if sub_norm else hidden
        results.append([y, *torch.autograd.grad(y, inputs, normal(rows, 12, seed=5).to(dtype).to(kind))])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_near(ours, exact, 2 * TOLERANCE[dtype])  # the product is rounded before GELU


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (65, 700)], ids=str)
def test_column_sums(shape: tuple[int, int]) -> None:
    x = normal(*shape).float()
    assert_near(sums.column_sums(x), x.double().sum(0), 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(5, 70), (0, 70), (3, 64)])
def test_head_and_cross_entropy(rows: int, classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK", 32)
    leaves = [normal(rows, 8), normal(classes, 8, seed=1), normal(classes, seed=2)]
    targets, results = torch.arange(rows, device=DEVICE) * 13 % classes, []
    for kind in (dtype, torch.float64):
        hidden, weight, bias = inputs = [t.to(dtype).to(kind).requires_grad_() for t in leaves]
        if kind == dtype:
            out = cross_entropy.head_cross_entropy(hidden, weight, bias, targets)
        else:
            out = plain_cross_entropy(torch.nn.functional.linear(hidden, weight, bias), targets)
        factors = normal(rows, seed=3).to(out.dtype)
        results.append([out[0], *torch.autograd.grad((out[0] * factors).sum(), inputs)])
    for ours, exact in zip(*results, strict=True):
        assert_near(ours, exact, 2 * TOLERANCE[dtype])  # logits are rounded


# --------------------------------------------------------------------------------------------------------- whole blocks


def layout() -> Layout:
    """Two images, three pairs and two texts; captions and texts of different lengths."""
    captions = torch.arange(5) >= torch.tensor([[5], [1], [3]])
    texts = torch.arange(6) >= torch.tensor([[2], [6]])
    return Layout((group(2, 4, None), group(3, 4, captions, 5), group(2, 0, texts, 6))).to(torch.device(DEVICE))


def test_packing_is_sample_by_sample() -> None:
    packing = layout().packing(torch.device(DEVICE))
    assert packing is not None
    assert packing.cumulative.tolist() == [0, 4, 8, 17, 22, 29, 31, 37] and packing.longest == 9
    assert packing.place.tolist() == [
        *range(8), 8, 9, 10, 11, 17, 18, 19, 20, 22, 23, 24, 25, 12, 13, 14, 15, 16, 21, 26, 27, 28, *range(29, 37),
    ]  # fmt: skip
    assert packing.place[packing.order].tolist() == list(range(37))


def test_a_mask_beyond_padding_has_no_packing() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    assert Layout((group(2, 0, None, 4, mask),)).packing(torch.device("cpu")) is None


@pytest.mark.parametrize("core", [None, plain_varlen_attention], ids=["padded", "varlen"])
@pytest.mark.parametrize("recompute", ["none", "attention", "selective"])
@pytest.mark.parametrize("selected", [False, True], ids=["", "selected"])
@pytest.mark.parametrize("attention", ["shared", "per_modality"])
def test_blocks_equal_plain_ones(
    attention: str, selected: bool, recompute: Recompute, core: VarlenAttention | None
) -> None:
    config = ModelConfig(
        layers=2, width=16, heads=2, ffn_width=24, patch_size=2, image_size=4, attention=attention,
        sub_layernorm=attention == "per_modality", vl_expert_layers=1, vocab_size=20, visual_vocab_size=8,
    )  # fmt: skip
    model, tokens = BEiT3(config).to(DEVICE), layout()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = normal(37, 16).float().requires_grad_()
    keep = ((torch.arange(74) % 5 > 0) * 1.25).view(2, 37).to(DEVICE)
    selection = None
    if selected:
        rows = torch.tensor([1, 5, 9, 10, 22, 28, 30, 36], device=DEVICE)
        selection = Selection(rows=rows, counts=(2, 2, 2, 2))
    for block in model.blocks.values():
        results = []
        for forward in (block.forward, FusedForward(block, core)):
            y: Tensor = forward(x, tokens, keep, selection, recompute)
            leaves = [x, *block.parameters()]
            results.append([y, *torch.autograd.grad(y, leaves, normal(*y.shape, seed=1).float())])
        names = ["y", "x", *(name for name, _ in block.named_parameters())]
        scale = torch.stack([t.norm() for t in results[1][2:]]).max()
        for name, ours, plain in zip(names, *reversed(results), strict=True):
            # Of key biases the gradient is zero but for rounding.
            assert (ours - plain).norm() <= 2e-6 * max(plain.norm(), scale), name


@pytest.mark.parametrize("attention", ["shared", "per_modality"])
def test_triton_kernels_compute_whole_blocks(attention: str) -> None:
    """A model that has all its parts on one rank: no block may silently keep to kernels one by one."""
    config = ModelConfig(
        layers=2, width=16, heads=2, ffn_width=24, patch_size=2, image_size=4, attention=attention,
        vl_expert_layers=1, vocab_size=20, visual_vocab_size=8,
    )  # fmt: skip
    model = BEiT3(config, device="meta")
    use_kernels(model, "triton")
    assert [type(block.forward) for block in model.blocks.values()] == 2 * [FusedForward]
