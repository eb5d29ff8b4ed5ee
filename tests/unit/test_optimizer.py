"""What decays, and which AdamW runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from beit3_dist.config import ModelConfig, OptimConfig
from beit3_dist.model import BEiT3
from beit3_dist.train.optimizer import build_optimizer, decays, parameter_groups

SIZE = {"layers": 2, "width": 8, "heads": 2, "ffn_width": 12, "patch_size": 2, "image_size": 4, "vocab_size": 20}
CONFIGS = {
    "paper": ModelConfig(**SIZE, vl_expert_layers=1),
    "released": ModelConfig(**SIZE, attention="per_modality", sub_layernorm=True, vl_expert_layers=0),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_matrices_decay_and_nothing_else(config: ModelConfig) -> None:
    for name, parameter in BEiT3(config, device="meta").named_parameters():
        is_matrix = name.endswith("weight") and "norm" not in name
        assert decays(name, parameter.shape) == is_matrix, name


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("blocks.1.ffn.vision.fc1.weight", True),
        ("blocks.0.attention.q.shared.weight", True),
        ("language_embedding.words.weight", True),
        ("vision_embedding.projection.weight", True),
        ("text_head.weight", True),
        ("text_head.bias", False),
        ("blocks.1.ffn.vl.norm.weight", False),
        ("norm.shared.bias", False),
        ("vision_embedding.cls_token", False),
        ("vision_embedding.mask_token", False),
        ("vision_embedding.positions", False),
        ("language_embedding.positions", False),
    ],
)
def test_by_name(name: str, decayed: bool) -> None:
    shapes = {n: p.shape for n, p in BEiT3(CONFIGS["paper"], device="meta").named_parameters()}
    assert decays(name, shapes[name]) == decayed


def test_the_two_groups_hold_every_parameter_once() -> None:
    model = BEiT3(CONFIGS["paper"])
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    held = [id(p) for p in decayed["params"] + plain["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_left_out() -> None:
    model = BEiT3(CONFIGS["paper"])
    model.text_head.requires_grad_(False)
    held = {id(p) for group in parameter_groups(model, 0.05) for p in group["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if not n.startswith("text_head")}


def test_whole_shapes_decide_under_zero_3() -> None:
    """There a parameter is an empty vector that knows its whole shape."""
    model = BEiT3(CONFIGS["paper"])
    expected = [[id(p) for p in group["params"]] for group in parameter_groups(model, 0.05)]
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert [[id(p) for p in group["params"]] for group in parameter_groups(model, 0.05)] == expected


def test_one_step_by_hand() -> None:
    """AdamW's first step is lr * sign(g) / (1 + eps / |g|), after the decay of the decayed alone."""
    model = nn.Sequential(nn.Linear(3, 2))
    config = OptimConfig(lr=0.1, weight_decay=0.5, eps=1e-8, warmup_steps=0)
    adamw = build_optimizer(model, False, config)
    assert type(adamw) is torch.optim.AdamW
    weight, bias = model[0].weight, model[0].bias
    before = weight.detach().clone(), bias.detach().clone()
    weight.grad, bias.grad = torch.full_like(weight, 2.0), torch.full_like(bias, -3.0)
    adamw.step()
    torch.testing.assert_close(weight.detach(), before[0] * (1 - 0.1 * 0.5) - 0.1)
    torch.testing.assert_close(bias.detach(), before[1] + 0.1)
