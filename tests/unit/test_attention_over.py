"""Where a model looks: what is drawn is the attention that the model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.config import ModelConfig
from beit3_dist.inference import Model
from beit3_dist.model import BEiT3, attention, fusion
from beit3_dist.use.attention import attention_over, attention_picture, layers_that_look
from tests.unit.test_inference import PIECES, tokenizer  # noqa: F401 (a fixture)

FUSION = {"attention": "per_modality", "vl_expert_layers": 0, "fusion_layers": 3, "connected_every": 1, "layers": 6}
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "one stack": ({"layers": 3, "vl_expert_layers": 1}, 3, 3),
    "fusion": (FUSION | {"language_layers": 1}, 3, 3),
    "own width": (FUSION | {"vision_layers": 4, "vision_width": 16, "vision_heads": 2}, 4, 3),
}
"""Fields of the model, and how many layers look at patches: of CLS, of words."""


@pytest.mark.parametrize("form", MODELS)
def test_what_is_drawn_is_what_the_model_computes(
    form: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    fields, of_cls, of_words = MODELS[form]
    size: dict[str, Any] = {"width": 32, "heads": 2, "ffn_width": 48, "patch_size": 8, "image_size": 32}
    config = ModelConfig(**size, **fields, vocab_size=PIECES + 10, visual_vocab_size=8, max_text_length=12)
    draw = torch.Generator().manual_seed(0)
    weights = {n: p.detach() + 0.3 * torch.randn(p.shape, generator=draw) for n, p in BEiT3(config).named_parameters()}
    objectives = ("masked_data_modeling",)
    save_model_folder(tmp_path / "model", weights, config, text_tokenizer=tokenizer, objectives=objectives)
    model = Model.load(tmp_path / "model", device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    computed: list[Tensor] = []

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """The shares, out of torch's own attention: its mixture of unit vectors."""
        every = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
        shares = scaled_dot_product_attention(q, k, every, attn_mask=attn_mask)
        if k.shape[2] >= 1 + config.patches:
            computed.append(shares[0].mean(0))
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)

    for module in (attention, fusion):
        monkeypatch.setattr(module, "scaled_dot_product_attention", watched)
    for text, count in (("", of_cls), ("a red circle", of_words)):
        looking = layers_that_look(model, bool(text))
        assert len(looking) == count
        for layer in range(count):
            computed.clear()
            over = attention_over(model, image, text, layer)
            place = layer if form == "one stack" or not text else len(computed) - of_words + layer
            shares = computed[place]
            rows = shares[1 + config.patches :] if text and len(shares) == shares.shape[1] else shares
            expected = (rows if text else rows[:1])[:, 1 : 1 + config.patches].mean(0)
            torch.testing.assert_close(over, expected / expected.sum())
        with pytest.raises(ValueError, match=f"^layer {count}: {count} look at patches"):
            attention_over(model, image, text, count)
        assert attention_picture(model, image, text).size == (448, 448)
    assert not any("look" in vars(module) for module in model.network.modules()), "the model is left as it was"
