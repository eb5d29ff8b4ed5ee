"""The image tokenizer's encoder by fused kernels, against the network itself under autocast and in fp32."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from beit3_dist.image_tokenizer.fused import FusedEncoder, fuse_encoder
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import ImageTargets
from beit3_dist.kernels.registry import operations
from beit3_dist.kernels.residual_norm.definition import Branch, Norms
from tests.unit.test_triton_kernels import DEVICE, EPS, normal

CPU = torch.device("cpu")


@pytest.fixture
def network() -> VQKD:
    """Of patches of 8 pixels, used at 32 pixels and trained at 16; its biases and norms are not the first ones."""
    built = VQKD(16, patch_size=8, width=48, layers=2, heads=2, codebook_size=40, code_dim=8, target_dim=8)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return built.requires_grad_(False)


def differences(network: VQKD, pixels: Tensor, exact: Tensor) -> float:
    return ((network.embed(pixels) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("version", ["definition", "triton"])
def test_vectors_are_as_near_to_those_of_fp32_as_autocast_s(network: VQKD, version: str) -> None:
    network.to(DEVICE)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    exact = network.embed(pixels)
    with torch.autocast(DEVICE, torch.bfloat16):
        of_autocast = differences(network, pixels, exact)
    operation = operations()["residual_norm"]
    function = operation.definition if version == "definition" else operation.function(operation.version("triton"))
    network.encoder.forward = FusedEncoder(network.encoder, function)  # type: ignore[method-assign]
    fused = differences(network, pixels, exact)
    # The interpreter cuts bits off where it stores bf16.
    assert 1e-4 < fused < of_autocast * (2 if version == "triton" and DEVICE == "cpu" else 1.2)


def test_it_computes_where_kernels_mean_it(network: VQKD) -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    codes = ImageTargets(network, CPU)(images)
    assert "forward" not in vars(network.encoder), "the CPU computes in fp32"
    assert not fuse_encoder(network, "torch") and not fuse_encoder(network, "compiled")
    assert torch.equal(network.encode(images / 255), codes)
    assert fuse_encoder(network, "triton")
    assert network.encode(images / 255).shape == codes.shape


def test_other_types_have_no_gradients() -> None:
    x, branch, weight = normal(2, 4).float(), normal(2, 4).bfloat16(), normal(1, 4)[0].float()
    residual_norm = operations()["residual_norm"]
    triton = residual_norm.function(residual_norm.version("triton"))
    r, (y,) = triton(x, Branch([branch], [weight]), None, Norms([2], [weight], [weight], EPS, dtype=torch.bfloat16))
    assert (r.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="different types have no gradients"):
        triton(x.requires_grad_(), Branch([branch], [weight]), None, None)
