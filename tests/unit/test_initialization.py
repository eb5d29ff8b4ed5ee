"""Initial values are a function of (seed, name), and have the deviations of the two schemes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import initial_value, materialize, zeros
from beit3_dist.parallel.tensor import apply_tensor_parallelism

SIZE = {
    "layers": 4,
    "width": 128,
    "heads": 4,
    "ffn_width": 256,
    "patch_size": 8,
    "image_size": 32,
    "vocab_size": 400,
    "visual_vocab_size": 64,
    "max_text_length": 30,
}
RELEASED = ModelConfig(**SIZE, attention="per_modality", sub_layernorm=True, vl_expert_layers=0)
PAPER = ModelConfig(**SIZE, attention="shared", sub_layernorm=False, vl_expert_layers=2)
both = pytest.mark.parametrize("config", [RELEASED, PAPER], ids=["released", "paper"])


def values(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in BEiT3(config, seed=seed).named_parameters()}


@both
def test_values_depend_on_seed_and_name_alone(config: ModelConfig) -> None:
    first = values(config)
    torch.manual_seed(123)  # the global generator plays no part
    again, other = values(config), values(config, seed=1)
    for name, value in reversed(first.items()):  # nor does the order
        assert torch.equal(value, again[name])
        assert torch.equal(value, initial_value(name, value.shape, config, 0))
        if value.std() > 0:
            assert not torch.equal(value, other[name]), f"{name} is the same with another seed"


@both
def test_no_two_parameters_share_their_values(config: ModelConfig) -> None:
    """Pipeline stages or experts that start alike are a known mistake of other code bases."""
    starts = [tuple(value.flatten()[:8].tolist()) for value in values(config).values() if value.std() > 0]
    assert len(set(starts)) == len(starts)


@both
def test_materialized_piece_by_piece_as_in_whole(config: ModelConfig) -> None:
    model = BEiT3(config, device="meta")
    pieces: list[tuple[str, nn.Module]] = [(name, piece) for name, piece in model.named_children() if name != "blocks"]
    pieces += [(f"blocks.{layer}", block) for layer, block in model.blocks.items()]
    for prefix, piece in reversed(pieces):
        materialize(piece, lambda name, shape: initial_value(name, shape, config, 3), "cpu", prefix=f"{prefix}.")
    whole = values(config, seed=3)
    assert whole.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters())


@both
def test_biases_and_norms(config: ModelConfig) -> None:
    for name, value in values(config).items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif not (config.sub_layernorm and name.endswith("token")):  # the released code leaves both tokens at zero
            assert value.std() > 0, name


def cut_normal_deviation(cut: float) -> float:
    """Deviation of a standard normal cut at +-cut: var = 1 - 2 cut phi(cut) / (2 Phi(cut) - 1)."""
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))


SMALL = 0.02 * cut_normal_deviation(1.0)  # 0.0108
TOLERANCE = 0.02
"""Relative. The smallest matrix has 128 x 128 elements, so the deviation's own error is about 1 / sqrt(2 * 16384),
0.6 % for a normal and less for a cut one."""


def expected_deviation(name: str, config: ModelConfig) -> float:
    parts = name.split(".")
    if config.sub_layernorm and name == "language_embedding.words.weight":
        return config.width**-0.5
    if parts[0] != "blocks":
        return SMALL
    layer, kinds = int(parts[1]) + 1, set(parts)
    if config.sub_layernorm:  # Magneto's gain, applied to values that have been cut
        return SMALL * (math.sqrt(math.log(2 * config.layers)) if kinds & {"v", "out", "fc1", "fc2"} else 1)
    return SMALL / (math.sqrt(2 * layer) if kinds & {"out", "fc2"} else 1)


@both
def test_deviations(config: ModelConfig) -> None:
    matrices = {n: v for n, v in values(config).items() if v.dim() > 1 and v.numel() >= 128 * 128}
    assert {n.split(".")[-3 if "attention" in n else -2] for n in matrices if n.startswith("blocks")} == {
        *("q", "k", "v", "out"),
        *("fc1", "fc2"),
    }
    for name, value in matrices.items():
        expected = expected_deviation(name, config)
        assert value.std().item() == pytest.approx(expected, rel=TOLERANCE), name
        assert abs(value.mean().item()) < 5 * expected / math.sqrt(value.numel()), name  # five standard errors


def test_the_gain_comes_after_the_cut() -> None:
    """The released code cuts at one deviation after the gain, which undoes it; here the range grows with the gain."""
    gain = math.sqrt(math.log(8))
    drawn = values(RELEASED)
    for part, bound in (("q", 0.02), ("k", 0.02), ("v", 0.02 * gain), ("out", 0.02 * gain)):
        largest = drawn[f"blocks.2.attention.{part}.vision.weight"].abs().max().item()
        assert 0.99 * bound < largest <= bound * (1 + 1e-6)


def test_what_is_frozen_on_the_meta_device_stays_frozen() -> None:
    model = BEiT3(RELEASED, device="meta")
    model.vision_embedding.requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    materialize(model, zeros, "cpu")
    assert frozen and {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    materialize(model.requires_grad_(False), zeros, "cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("sequence", [False, True])
def test_what_is_frozen_stays_frozen_when_it_is_cut_over_ranks(sequence: bool) -> None:
    model = BEiT3(RELEASED, device="meta")
    model.language_embedding.requires_grad_(False)
    model.blocks["0"].requires_grad_(False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    group: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    apply_tensor_parallelism(model, group, sequence)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
