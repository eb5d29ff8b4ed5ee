"""The single tower (ViLT's, ViT-BERT's) against timm's VisionTransformer and torch's own encoder, in fp64."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from beit3_dist.checkpoint.formats import load_released
from beit3_dist.checkpoint.timm_form import weights_to_timm
from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3, parameter_counts

TOWER = ModelConfig(layers=3, width=32, heads=4, ffn_width=48, patch_size=8, image_size=32, ffn="shared",
                    vl_expert_layers=0, vocab_size=60, visual_vocab_size=20, max_text_length=16)  # fmt: skip
close = torch.testing.assert_close


def tower() -> BEiT3:
    """With values of ordinary size: initial biases are zero and would hide mistakes."""
    model, draw = BEiT3(TOWER).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_images_pass_timms_vision_transformer(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    ours = tower()
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=1.5, num_classes=0, global_pool="",
        norm_layer=partial(nn.LayerNorm, eps=TOWER.layer_norm_eps),
    ).double()  # fmt: skip
    weights = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    theirs.load_state_dict(weights_to_timm(weights, TOWER))
    close(ours.encode(images(2)), theirs(images(2)))


@pytest.mark.parametrize("config", [TOWER, replace(TOWER, ffn="per_modality")], ids=["tower", "shared attention"])
def test_a_run_starts_from_timms_vision_transformer(
    config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As ViLT does, and VLMo. Its classifier is left out, and its epsilon, which no file tells, is the run's."""
    theirs = timm.models.VisionTransformer(
        img_size=48, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=1.5, num_classes=5
    )
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    model = load_released(tmp_path / "vit.pth", replace(config, image_size=48, layer_norm_eps=1e-6))
    notes = " ".join(record.getMessage() for record in caplog.records)
    assert "what vision and language share starts from them" in notes
    assert "has no weights for the language side" in notes and "classifier stands on CLS" in notes
    pictures = torch.randn(2, 3, 48, 48)
    close(model.encode(pictures), theirs.forward_features(pictures), rtol=1e-4, atol=1e-5)


def plain(model: BEiT3) -> nn.TransformerEncoder:
    """torch's encoder with the same weights."""
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, 0.0, "gelu", TOWER.layer_norm_eps, batch_first=True, norm_first=True, dtype=torch.float64
    )
    encoder = nn.TransformerEncoder(layer, 3, model.norm["shared"], enable_nested_tensor=False)
    for theirs, ours in zip(encoder.layers, model.blocks.values(), strict=True):
        attention, expert = ours.attention, ours.ffn["shared"]
        for kind in ("weight", "bias"):
            qkv = torch.cat([getattr(part["shared"], kind) for part in (attention.q, attention.k, attention.v)])
            theirs.get_parameter(f"self_attn.in_proj_{kind}").data.copy_(qkv.detach())
            for name, module in {
                "self_attn.out_proj": attention.out["shared"], "norm1": ours.attention_norm["shared"],
                "norm2": expert.norm, "linear1": expert.fc1, "linear2": expert.fc2,
            }.items():  # fmt: skip
                theirs.get_parameter(f"{name}.{kind}").data.copy_(getattr(module, kind).detach())
    return encoder


TWINS = {
    "blocks.0.attention.out.shared.weight": "layers.0.self_attn.out_proj.weight",
    "blocks.0.ffn.shared.fc1.weight": "layers.0.linear1.weight",
    "blocks.1.ffn.shared.norm.bias": "layers.1.norm2.bias",
    "blocks.2.ffn.shared.fc2.weight": "layers.2.linear2.weight",
}


def test_pairs_and_texts_pass_torchs_encoder() -> None:
    ours = tower()
    theirs = plain(ours)
    text = torch.randint(4, 60, (3, 10), generator=torch.Generator().manual_seed(2))
    padding = torch.arange(10) >= torch.tensor([10, 7, 3])[:, None]
    embed = ours.language_embedding
    words = embed(text.flatten(), torch.arange(10).repeat(3)).unflatten(0, (3, 10))
    for pictures in (images(3), None):
        patches = ours.vision_embedding(pictures) if pictures is not None else words[:, :0]
        hidden = torch.cat([patches, words], dim=1)
        hidden_away = torch.cat([padding.new_zeros(3, patches.shape[1]), padding], dim=1)
        expected = theirs(hidden, src_key_padding_mask=hidden_away)[~hidden_away]
        found = ours.encode(pictures, text, padding)[~hidden_away]
        close(found, expected)
        toward = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        leaves = [ours.get_parameter(name) for name in TWINS], [theirs.get_parameter(name) for name in TWINS.values()]
        of_ours, of_theirs = (
            torch.autograd.grad((value * toward).sum(), [embed.words.weight, *own], retain_graph=True)
            for value, own in zip((found, expected), leaves, strict=True)
        )
        close(of_ours, of_theirs)


def test_its_parameters_by_hand() -> None:
    expert, norms = 2 * 32 * 48 + 48 + 32, 2 * 32
    assert parameter_counts(BEiT3(TOWER, device="meta")) == {
        "shared": 3 * expert,
        "attention": 3 * 4 * (32 * 32 + 32),
        "embeddings": (3 * 64 + 1) * 32 + 2 * 32 + (3 + 16) * 32 + 60 * 32 + 18 * 32,
        "heads": (20 + 60) * 33,
        "norms": norms * (3 * 2 + 1),
    }
    with pytest.raises(ValueError, match=r"^model\.vl_expert_layers=3: with model\.ffn=shared there are no experts"):
        ModelConfig(ffn="shared")
