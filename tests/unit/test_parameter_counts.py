"""The three published sizes, counted on the meta device: the README's of the released models, the paper's table 2."""

from __future__ import annotations

import pytest

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3, parameter_counts

RELEASED = {
    "attention": "per_modality",
    "sub_layernorm": True,
    "vl_expert_layers": 0,
    "patch_size": 16,
    "image_size": 224,
}
BASE = ModelConfig(**RELEASED, layers=12, width=768, heads=12, ffn_width=3072)
LARGE = ModelConfig(**RELEASED, layers=24, width=1024, heads=16, ffn_width=4096)


def counts(config: ModelConfig) -> dict[str, int]:
    model = BEiT3(config, device="meta")
    by_role = parameter_counts(model)
    assert sum(by_role.values()) == sum(p.numel() for p in model.parameters())
    return by_role


@pytest.mark.parametrize(("config", "whole", "encoder"), [(BASE, 276.51, 220.99), (LARGE, 746.71, 672.70)])
def test_released_sizes(config: ModelConfig, whole: float, encoder: float) -> None:
    by_role = counts(config)
    total = sum(by_role.values())
    assert round(total / 1e6, 2) == whole
    assert round((total - by_role["heads"]) / 1e6, 2) == encoder
    assert "vl" not in by_role


def test_giant_is_table_2_of_the_paper() -> None:
    """The defaults of `ModelConfig` are the giant. 1.9B in the paper are the groups of its table, the word embedding
    and untied, biased heads."""
    by_role = counts(ModelConfig())
    millions = {role: round(count / 1e6, 2) for role, count in by_role.items()}
    assert (millions["vision"], millions["language"], millions["vl"]) == (692.36, 692.36, 51.93)
    assert millions["attention"] == 317.42
    words = 64010 * 1408
    named = sum(by_role[role] for role in ("vision", "language", "vl", "attention", "heads"))
    assert round((named + words) / 1e6, 1) == 1945.9
    assert by_role["heads"] == (64010 + 8192) * (1408 + 1)


def test_each_group_by_hand() -> None:
    """2 layers, the upper one with a VL expert; D = 8, F = 12, patches of 2 x 2 pixels, 4 of them."""
    config = ModelConfig(
        layers=2,
        width=8,
        heads=2,
        ffn_width=12,
        patch_size=2,
        image_size=4,
        vl_expert_layers=1,
        vocab_size=20,
        visual_vocab_size=6,
        max_text_length=5,
    )
    expert = 2 * 8 * 12 + 12 + 8
    assert counts(config) == {
        "vision": 2 * expert,
        "language": 2 * expert,
        "vl": expert,
        "attention": 2 * 4 * (8 * 8 + 8),
        # projection, CLS, mask token, positions of 2 + CLS + 4 patches; words, positions of 2 + 5
        "embeddings": (3 * 4 + 1) * 8 + 2 * 8 + (2 + 1 + 4) * 8 + 20 * 8 + (2 + 5) * 8,
        "heads": (20 + 6) * (8 + 1),
        # scale and shift: attention's norm per layer, one norm per expert, the final norm
        "norms": 2 * 8 * (2 + 5 + 1),
    }
