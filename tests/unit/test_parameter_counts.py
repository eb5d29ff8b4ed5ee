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


def test_mplugs_decoder_is_berts() -> None:
    """12 layers of BERT base with a cross-attention each, words and positions: 109.5M - the pooler's 0.6M - the types
    of segments + 12 x 2.36M. And CLIP's ViT-L/14 is 303.2M without its output projection of 1,024 x 768."""
    mplug = ModelConfig(layers=12, width=768, heads=12, ffn_width=3072, patch_size=14, image_size=224,
                        attention="per_modality", vl_expert_layers=0, vocab_size=30522, max_text_length=512,
                        fusion_layers=6, decoder_layers=12, vision_layers=24, vision_width=1024,
                        vision_heads=16)  # fmt: skip
    model = BEiT3(mplug, device="meta")
    decoder = sum(p.numel() for p in model.decoder.parameters())
    assert decoder / 1e6 == pytest.approx(109.48 - 0.59 + 12 * 2.36, rel=1e-3)
    vision = sum(p.numel() for name, p in model.vision_embedding.named_parameters() if "bridge" not in name)
    assert vision / 1e6 == pytest.approx(303.18, rel=1e-3)
    assert counts(mplug)["decoder"] == decoder


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
