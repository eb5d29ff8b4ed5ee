"""`kernels: triton` in a whole model, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit3_dist.config import ModelConfig, Recompute
from beit3_dist.kernels import registry
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model import BEiT3
from beit3_dist.parallel import kernels
from beit3_dist.parallel.kernels import check_kernels, use_kernels
from tests.equality import assert_close, assert_tensors_close
from tests.micro_batches import counts_of, prepared, pretraining, random_micro_batch
from tests.unit.tar_fixtures import small_run

CONFIG = ModelConfig(
    layers=1, width=32, heads=2, ffn_width=48, patch_size=16, image_size=32, vocab_size=150, visual_vocab_size=40,
    max_text_length=20, drop_path=0.0, attention="per_modality", sub_layernorm=True, vl_expert_layers=0,
)  # fmt: skip
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


SHARED = replace(CONFIG, layers=3, attention="shared", sub_layernorm=False, vl_expert_layers=1, drop_path=0.5)
"""As the giant: each block but the last leaves its branch to the next one's first kernel, drop path in it."""


def losses_and_gradients(
    kernels: str, config: ModelConfig = CONFIG, recompute: Recompute = "none"
) -> tuple[Tensor, dict[str, Tensor]]:
    model = BEiT3(config, seed=3).to(DEVICE)
    model.blocks.recompute, model.blocks.recompute_every = recompute, 2
    use_kernels(model, kernels)
    assert all(m.compute.__module__.endswith(".triton") == (kernels == "triton") for m in norms(model))
    objective = pretraining(model, 5).train()
    objective.objectives.multiple = 5 if kernels == "triton" else 1  # of which the captions' words are one, as on CUDA
    micro_batch = random_micro_batch(config, images=2, texts=2, pairs=2)
    inputs = prepared(objective, micro_batch, DEVICE)
    loss, statistics = objective(*inputs, counts_of(objective, micro_batch, DEVICE), 7)
    loss.backward()
    return statistics[0], {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def norms(model: BEiT3) -> list[LayerNorm]:
    found = [module for module in model.modules() if isinstance(module, LayerNorm)]
    # Before and after attention, before and inside the FFN, at the end, of two experts each; or three blocks with one
    # norm and two or three experts.
    assert len(found) == (10 if len(model.blocks) == 1 else 11)
    return found


def test_a_model_computes_the_same_with_triton() -> None:
    losses, gradients = losses_and_gradients("triton")
    expected, of_torch = losses_and_gradients("torch")
    assert_close(losses, expected, "losses")
    assert_tensors_close(gradients, of_torch)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_blocks_that_leave_their_branch_to_the_next_one(recompute: Recompute) -> None:
    losses, gradients = losses_and_gradients("triton", SHARED, recompute)
    expected, of_torch = losses_and_gradients("torch", SHARED)
    assert_close(losses, expected, "losses")
    assert_tensors_close(gradients, of_torch)


def test_triton_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path)
    config.kernels = "triton"
    check_kernels(config.kernels)  # in the interpreter
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="kernels=triton needs a CUDA device: use kernels=torch"):
        check_kernels(config.kernels)


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "head_dim", "expected"),
    [
        (("flash_attn.cute", "torch.nn.attention.varlen"), (9, 0), torch.bfloat16, 88, "flash"),
        (("flash_attn.cute", "torch.nn.attention.varlen"), (8, 0), torch.bfloat16, 88, "varlen"),
        (("torch.nn.attention.varlen",), (9, 0), torch.bfloat16, 64, "varlen"),
        ((), (9, 0), torch.bfloat16, 64, "padded"),
        (("flash_attn.cute",), (9, 0), torch.float32, 64, "padded"),
        (("flash_attn.cute",), (9, 0), torch.bfloat16, 12, "padded"),
    ],
)
def test_the_fastest_attention_that_can_run_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[str, ...],
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    expected: str,
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda module: module in installed or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert kernels.chosen_attention("auto", "triton", dtype, head_dim) == expected
    assert kernels.chosen_attention("auto", "torch", dtype, head_dim) == "padded"
    assert kernels.chosen_attention("padded", "triton", dtype, head_dim) == "padded"


@pytest.mark.parametrize("attention", ["varlen", "flash"])
def test_what_attention_needs_is_said(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"{attention} needs kernels=triton, precision=bf16 or fp8 and a CUDA device"):
        check_kernels("torch", attention)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(registry, "find_spec", lambda module: module == "triton" or None)
    with pytest.raises(ValueError, match=f"attention_kernel={attention} needs (the package|torch)"):
        check_kernels("triton", attention)
