"""A micro-batch of masked data modelling on the GPU: one pass, three, and the CPU's fp32; each kind of kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.objectives.three_passes import prepare_passes, three_passes
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.fused import FusedForward
from beit3_dist.parallel.graphs import CudaRecorder, Graphs
from beit3_dist.parallel.kernels import use_kernels
from tests.device import DEVICE, ON_GPU
from tests.equality import assert_close, assert_tensors_close
from tests.graphs import StandIn, fuse
from tests.micro_batches import counts_of, precomputed_codes, prepared, pretraining, random_micro_batch

CPU = torch.device("cpu")
GIANT: dict[str, Any] = dict(layers=2, width=1408, heads=16, ffn_width=6144, patch_size=14, image_size=224)
BASE: dict[str, Any] = dict(layers=2, width=768, heads=12, ffn_width=3072, patch_size=16, image_size=224)
SMALL: dict[str, Any] = dict(layers=2, width=48, heads=2, ffn_width=64, patch_size=8, image_size=32, vocab_size=150,
             visual_vocab_size=40, max_text_length=90)  # fmt: skip
PAPER = ModelConfig(**(GIANT if ON_GPU else SMALL), vl_expert_layers=1, drop_path=0.3)
"""The giant's blocks, two of its 40."""
RELEASED = ModelConfig(**(BASE if ON_GPU else SMALL), attention="per_modality", sub_layernorm=True,
                       vl_expert_layers=0, drop_path=0.3)  # fmt: skip
MODELS = pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["giant", "base"])
LENGTHS = {"caption_length": 40, "text_length": 80} if ON_GPU else {}
Result = tuple[Tensor, dict[str, Tensor]]


@cache
def objective(released: bool) -> PretrainingModule:
    """With biases and gains that are spread: zeros and ones hide mistakes."""
    model = BEiT3(RELEASED if released else PAPER, seed=3)
    module = pretraining(model, 5, pair_text_weight=0.5)
    numbers = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=numbers))
    return module.train()


def copied(config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: str = "torch") -> PretrainingModule:
    """The objective of a model on the device, computed by one kind of kernels."""
    original = objective(config is RELEASED)
    module = pretraining(BEiT3(config, device="meta"), 5, pair_text_weight=0.5).train()
    module.to_empty(device=device)
    module.load_state_dict(original.state_dict())
    module.to(dtype)
    use_kernels(module.model, kernels)
    if kernels == "triton":
        assert all(isinstance(block.forward, FusedForward) for block in module.model.blocks.values())
    return module


def compute(module: PretrainingModule, batch: dict[str, int], by_stream: bool = False) -> Result:
    """The four sums of cross-entropies and the gradients, on the CPU."""
    device, config = next(module.parameters()).device, module.model.config
    micro_batch = random_micro_batch(config, **LENGTHS, **batch)
    counts = counts_of(module, micro_batch, device)
    if by_stream:
        passes = prepare_passes(module, micro_batch, device, precomputed_codes(config))
        loss, statistics = three_passes(passes, counts, 7)
    else:
        loss, statistics = module(*prepared(module, micro_batch, device), counts, 7)
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    module.zero_grad()
    return statistics[0].cpu(), {name: gradient.cpu() for name, gradient in gradients.items()}


@cache
def on_the_cpu(released: bool, precision: str = "fp32") -> Result:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return compute(copied(RELEASED if released else PAPER, CPU, dtype), {"seed": 1})


def assert_same(ours: Result, theirs: Result) -> None:
    assert_close(ours[0], theirs[0], "sums of cross-entropies")
    assert_tensors_close(ours[1], theirs[1])


def stray(result: Result, reference: Result) -> tuple[float, float]:
    """How far losses and gradients lie from the reference."""
    of_gradients = sum((result[1][n].double() - g.double()).square().sum().item() for n, g in reference[1].items())
    return (result[0].double() - reference[0].double()).norm().item(), of_gradients**0.5


@MODELS
def test_one_pass_is_three_and_what_the_cpu_computes(config: ModelConfig) -> None:
    """In fp32."""
    module = copied(config, DEVICE, torch.float32)
    one = compute(module, {"seed": 1})
    assert one[0].min() > 0
    assert_same(one, compute(module, {"seed": 1}, by_stream=True))
    assert_same(one, on_the_cpu(config is RELEASED))


@MODELS
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_bf16_strays_no_more_than_twice_as_far_as_on_the_cpu(config: ModelConfig, kernels: str) -> None:
    released = config is RELEASED
    exact = on_the_cpu(released)
    ours = stray(compute(copied(config, DEVICE, torch.bfloat16, kernels), {"seed": 1}), exact)
    of_cpu = stray(on_the_cpu(released, "bf16"), exact)
    assert 0 < ours[0] <= 2 * max(of_cpu[0], 1e-3 * exact[0].norm().item()) and 0 < ours[1] <= 2 * of_cpu[1]


@MODELS
def test_triton_computes_what_torch_does(config: ModelConfig) -> None:
    batch = {"seed": 2, "images": 2, "pairs": 3}
    expected = compute(copied(config, DEVICE, torch.float32), batch)
    assert_same(compute(copied(config, DEVICE, torch.float32, "triton"), batch), expected)


@MODELS
def test_graphs_compute_what_their_kernels_do(config: ModelConfig) -> None:
    """Four micro-batches of one shape, of which two are repeated, with other captions, samples and drop path."""
    plain, ours = (copied(config, DEVICE, torch.bfloat16, "triton" if ON_GPU else "torch") for _ in range(2))
    if not ON_GPU:
        fuse(plain.model)
        fuse(ours.model)
    Graphs(ours.model.blocks, CudaRecorder() if ON_GPU else StandIn(ours.model))
    for module in (plain, ours):
        module.objectives.multiple, module.objectives.fullest = 128, {1: 256}
    for seed in range(4):
        mine, its = (compute(module, {"seed": seed}) for module in (ours, plain))
        assert (mine[0] - its[0]).norm() <= 2e-3 * its[0].norm()
        largest = max(gradient.norm() for gradient in its[1].values())
        for name, gradient in its[1].items():
            assert (mine[1][name] - gradient).norm() <= 0.02 * max(gradient.norm(), 1e-2 * largest), name


@MODELS
def test_compiled_computes_what_torch_does(config: ModelConfig) -> None:
    """In fp32, one code for micro-batches of all lengths."""
    torch._dynamo.reset()
    plain, compiled = (copied(config, DEVICE, torch.float32, kernels) for kernels in ("torch", "compiled"))
    batches: list[dict[str, int]] = [{"seed": 0}, {"seed": 1, "images": 5}, {"seed": 3, "pairs": 0}]
    for batch in batches:
        assert_same(compute(compiled, batch), compute(plain, batch))


@MODELS
def test_compiled_in_bf16(config: ModelConfig) -> None:
    released = config is RELEASED
    exact = on_the_cpu(released)
    plain, ours = (
        stray(compute(copied(config, DEVICE, torch.bfloat16, kernels), {"seed": 1}), exact)
        for kernels in ("torch", "compiled")
    )
    assert 0 < ours[0] <= 2 * max(plain[0], 1e-3 * exact[0].norm().item()) and 0 < ours[1] <= 2 * plain[1]
