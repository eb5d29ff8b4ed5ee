"""Blocks that fused kernels compute against plain ones, and what is special of these kernels."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.kernels.cross_entropy import triton as cross_entropy
from beit3_dist.kernels.registry import Sizes, operations
from beit3_dist.kernels.residual_norm import triton as residual_norm
from beit3_dist.kernels.residual_norm.definition import Norms
from beit3_dist.kernels.triton import launch, sums
from beit3_dist.kernels.varlen_attention.definition import VarlenAttention, plain_varlen_attention
from beit3_dist.model import BEiT3
from beit3_dist.model.token_layout import Selection, TokenLayout, fill, group
from beit3_dist.parallel.fused import FusedForward, add
from beit3_dist.parallel.kernels import use_kernels
from tests.kernels import check
from tests.unit.test_triton_kernels import DEVICE, EPS, normal

# ------------------------------------------------------------------------------------------------- kernels, one by one


def check_in_triton(name: str, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
    operation = operations()[name]
    check(operation, operation.version("triton"), sizes, torch.device(DEVICE), dtype)


def test_residual_and_norm_with_many_programs_of_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 3)
    monkeypatch.setattr(sums, "ROWS", 4)
    check_in_triton("residual_norm", Sizes(tokens=40, width=24, heads=3))


def test_tokens_in_another_order_have_one_expert() -> None:
    x = normal(2, 4).float()
    norms = Norms([1, 1], [x[0], x[0]], [x[0], x[0]], EPS, torch.arange(2, device=DEVICE))
    with pytest.raises(ValueError, match="must belong to one expert"):
        residual_norm.residual_norm(x, None, None, norms)


def test_sums_of_more_rows_and_columns_than_programs_take_at_a_time() -> None:
    check_in_triton("column_sums", Sizes(tokens=65, width=700, heads=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_with_many_blocks_of_classes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK", 32)
    check_in_triton("head_cross_entropy", Sizes(width=8, heads=1, masked=5, classes=70), dtype)


# --------------------------------------------------------------------------------------------------------- whole blocks


def layout() -> TokenLayout:
    """Two images, three pairs and two texts; captions and texts of different lengths."""
    captions = torch.arange(5) >= torch.tensor([[5], [1], [3]])
    texts = torch.arange(6) >= torch.tensor([[2], [6]])
    return TokenLayout((group(2, 4, None), group(3, 4, captions, 5), group(2, 0, texts, 6))).to(torch.device(DEVICE))


def test_packing_is_sample_by_sample() -> None:
    packing = layout().packing(torch.device(DEVICE))
    assert packing is not None
    assert packing.cumulative.tolist() == [0, 4, 8, 17, 22, 29, 31, 37] and packing.longest == 9
    assert packing.place.tolist() == [
        *range(8), 8, 9, 10, 11, 17, 18, 19, 20, 22, 23, 24, 25, 12, 13, 14, 15, 16, 21, 26, 27, 28, *range(29, 37),
    ]  # fmt: skip
    assert packing.place[packing.order].tolist() == list(range(37))


def test_words_of_no_sample_are_a_sample_of_their_own() -> None:
    """Also where there are none of them: how many samples attention has does not depend on it."""
    filled = TokenLayout(fill(layout().groups, [1, 2], 4))
    packing = filled.packing(torch.device(DEVICE))
    assert filled.segments == (8, 12, 12, 8) and filled.tokens == 37
    assert packing is not None and packing.cumulative.tolist() == [0, 4, 8, 17, 22, 29, 32, 34, 40, 40]
    assert packing.place[packing.order].tolist() == list(range(40))


def test_a_mask_beyond_padding_has_no_packing() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    assert TokenLayout((group(2, 0, None, 4, mask),)).packing(torch.device("cpu")) is None


CORES: list[VarlenAttention | None] = [None, plain_varlen_attention]  # of padded samples, and of packed ones


@pytest.mark.parametrize("recompute", ["none", "attention", "selective"])
@pytest.mark.parametrize("selected", [False, True], ids=["", "selected"])
@pytest.mark.parametrize("attention", ["shared", "per_modality"])
def test_blocks_equal_plain_ones(attention: str, selected: bool, recompute: Recompute) -> None:
    """Of both blocks one has each core, and the other one where rows are selected: each core meets all else."""
    config = ModelConfig(
        layers=2, width=16, heads=2, ffn_width=24, patch_size=2, image_size=4, attention=attention,
        sub_layernorm=attention == "per_modality", vl_expert_layers=1, vocab_size=20, visual_vocab_size=8,
    )  # fmt: skip
    compare_blocks(config, selected, recompute)


def test_blocks_of_a_single_tower_equal_plain_ones() -> None:
    config = ModelConfig(
        layers=2, width=16, heads=2, ffn_width=24, patch_size=2, image_size=4, ffn="shared", vl_expert_layers=0,
        vocab_size=20, visual_vocab_size=8,
    )  # fmt: skip
    compare_blocks(config, selected=True, recompute="none")


def compare_blocks(config: ModelConfig, selected: bool, recompute: Recompute) -> None:
    """Raises AssertionError where fused blocks of random values compute something else than plain ones."""
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
    kernels = {name: o.function(v) for name, o in operations().items() for v in o.versions if v.name == "triton"}
    for block, core in zip(model.blocks.values(), reversed(CORES) if selected else CORES, strict=True):
        results = []
        for forward in (block.forward, FusedForward(block, kernels, core)):
            y: Tensor = add(forward(x, tokens, keep, selection, recompute), kernels["residual_norm"])
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
