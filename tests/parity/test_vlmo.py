"""VLMo's released layout: a plain VLMo computes the same from the weights that a model of ours is given, and gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention

from beit3_dist.checkpoint.formats import read_source
from beit3_dist.checkpoint.model_folder import read_model_folder, save_model_folder
from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from tools.convert_checkpoint import main

WIDTH, HEADS, LAYERS, WORDS, LENGTH, EPS = 32, 4, 3, 60, 12, 1e-6
CONFIG = ModelConfig(layers=LAYERS, width=WIDTH, heads=HEADS, ffn_width=4 * WIDTH, patch_size=8, image_size=32,
                     vl_expert_layers=1, vocab_size=WORDS, visual_vocab_size=20, max_text_length=LENGTH, word_norm=True,
                     layer_norm_eps=EPS)  # fmt: skip
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEXT = torch.randint(4, WORDS, (2, 9), generator=torch.Generator().manual_seed(2))


def vlmos(relative: bool, scaled: bool) -> dict[str, Tensor]:
    """A state dict with the keys and shapes of unilm's VLMo: with relative positions (base, large), or without."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.cls_token": (1, 1, WIDTH), "transformer.patch_embed.proj.weight": (WIDTH, 3, 8, 8),
        "text_embeddings.word_embeddings.weight": (WORDS, WIDTH), "token_type_embeddings.weight": (2, WIDTH),
        "text_embeddings.position_embeddings.weight": (LENGTH, WIDTH), "itc_text_proj.fc.weight": (WIDTH, WIDTH),
        "text_embeddings.token_type_embeddings.weight": (2, WIDTH), "itc_image_proj.fc.weight": (WIDTH, WIDTH),
        "itc_vl_text_proj.fc.weight": (WIDTH, WIDTH), "mlm_score.decoder.weight": (WORDS, WIDTH), "logit_scale": (),
    }  # fmt: skip
    if relative:
        shapes["relative_position_bias_table"] = (7 * 7 + 3 + 2 * 196 + 2, HEADS * LAYERS)
    else:
        shapes["transformer.pos_embed"] = (1, 17, WIDTH)
    layers = {"pooler.dense": (WIDTH, WIDTH), "itm_score.fc": (2, WIDTH)}
    norms = ["transformer.norm", "text_embeddings.LayerNorm"]
    for number in range(LAYERS):
        block = f"transformer.blocks.{number}"
        shapes |= {f"{block}.attn.qkv.weight": (3 * WIDTH, WIDTH)} | {f"{block}.attn.{x}_bias": (WIDTH,) for x in "qv"}
        shapes |= {f"{block}.gamma_{n}": (WIDTH,) for n in (1, 2) if scaled}
        layers[f"{block}.attn.proj"] = (WIDTH, WIDTH)
        norms.append(f"{block}.norm1")
        for side in ("imag", "text", "vl")[: 3 if number == LAYERS - 1 else 2]:
            layers |= {f"{block}.mlp_{side}.fc1": (4 * WIDTH, WIDTH), f"{block}.mlp_{side}.fc2": (WIDTH, 4 * WIDTH)}
            norms.append(f"{block}.norm2_{side}")
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.{leaf}": (WIDTH,) for name in norms for leaf in ("weight", "bias")}
    shapes["transformer.patch_embed.proj.bias"] = (WIDTH,)
    draw = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def encoded(state: dict[str, Tensor], side: str) -> Tensor:
    """VLMo (Wang et al. 2022) of images, texts or pairs, [B, N, D], patches before words."""

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], EPS)

    embedding, patch = "text_embeddings", "transformer.patch_embed.proj"
    w = state[f"{embedding}.word_embeddings.weight"][TEXT] + state[f"{embedding}.token_type_embeddings.weight"][0]
    w = normed(w + state[f"{embedding}.position_embeddings.weight"][: TEXT.shape[1]], f"{embedding}.LayerNorm")
    w = w + state["token_type_embeddings.weight"][0]
    v = conv2d(PIXELS, state[f"{patch}.weight"], state[f"{patch}.bias"], stride=8).flatten(2).transpose(1, 2)
    v = torch.cat([state["transformer.cls_token"].expand(2, -1, -1), v], dim=1) + state["transformer.pos_embed"]
    v = v + state["token_type_embeddings.weight"][1]
    x = {"imag": v, "text": w, "vl": torch.cat([v, w], dim=1)}[side]
    for number in range(LAYERS):
        block = f"transformer.blocks.{number}"
        q_bias, v_bias = state[f"{block}.attn.q_bias"], state[f"{block}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros(WIDTH), v_bias])
        qkv = linear(normed(x, f"{block}.norm1"), state[f"{block}.attn.qkv.weight"], bias)
        mixed = scaled_dot_product_attention(*qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4))
        x = x + state.get(f"{block}.gamma_1", 1) * dense(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        joint = side != "vl" or f"{block}.mlp_vl.fc1.weight" in state
        parts = [(side, x)] if joint else [("imag", x[:, :17]), ("text", x[:, 17:])]
        x = torch.cat([
            part + state.get(f"{block}.gamma_2", 1) * dense(
                gelu(dense(normed(part, f"{block}.norm2_{own}"), f"{block}.mlp_{own}.fc1")), f"{block}.mlp_{own}.fc2")
            for own, part in parts
        ], dim=1)  # fmt: skip
    return normed(x, "transformer.norm")


def close_to_plain(model: BEiT3, state: dict[str, Tensor]) -> None:
    for side, given in {"imag": (PIXELS, None), "text": (None, TEXT), "vl": (PIXELS, TEXT)}.items():
        torch.testing.assert_close(model.encode(*given), encoded(state, side), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True], ids=["base plus", "with layer scale"])
def test_it_loads(scaled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = vlmos(relative=False, scaled=scaled)
    torch.save({"state_dict": state}, tmp_path / "vlmo.pt")
    found = read_source(tmp_path / "vlmo.pt", HEADS, EPS)
    expected = {"vl_expert_layers": 1, "attention": "shared", "word_norm": True, "max_text_length": LENGTH}
    assert {name: getattr(found.config, name) for name in expected} == expected and found.config.image_size == 32
    model = BEiT3(found.config)
    model.load_state_dict(found.weights, strict=False)
    close_to_plain(model.eval(), state)
    heads = {name for name in found.weights if name.startswith("objective_heads.")}
    assert torch.equal(found.weights["objective_heads.matching.score.weight"], state["itm_score.fc.weight"])
    assert len(heads) == 4 + 3
    assert "there is no place for itc_vl_text_proj, mlm_score of VLMo" in caplog.text


@torch.no_grad()
def test_it_is_written_and_read_again(tmp_path: Path) -> None:
    model, draw = BEiT3(CONFIG).eval(), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    save_model_folder(tmp_path / "ours", dict(model.named_parameters()), CONFIG)
    main([str(tmp_path / "ours"), str(tmp_path / "vlmo.pth"), "--to", "vlmo"])
    state = torch.load(tmp_path / "vlmo.pth", weights_only=True)
    close_to_plain(model, state)
    known = vlmos(relative=False, scaled=False)
    assert all(known[name].shape == value.shape for name, value in state.items())
    main([str(tmp_path / "vlmo.pth"), str(tmp_path / "again"), "--to", "safetensors", "--attention_heads", str(HEADS)])
    again = read_model_folder(tmp_path / "again").weights
    for name, value in model.named_parameters():
        if "positions" in name:
            assert torch.equal(again[name][2:], value[2:])
        elif "attention.k" not in name or name.endswith("weight"):
            assert name not in again and ("head" in name or "mask_token" in name) or torch.equal(again[name], value)
        else:
            assert not again[name].any()  # a key's bias, which changes nothing


def test_relative_positions_are_left_out_and_what_is_unknown_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    state = vlmos(relative=True, scaled=True)
    torch.save(state, tmp_path / "base.pt")
    found = read_source(tmp_path / "base.pt", HEADS, EPS)
    assert found.config.image_size == 32 and "its relative positions are left out" in caplog.text
    of_images = found.weights["vision_embedding.positions"][2:]
    assert torch.equal(of_images, state["token_type_embeddings.weight"][1].expand(17, -1))
    torch.save(state | {"transformer.blocks.0.other.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"transformer\.blocks\.0\.other\.weight is no key of VLMo"):
        read_source(tmp_path / "other.pt", HEADS, EPS)
    del state["transformer.blocks.1.attn.q_bias"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"half\.pt.*q_bias"):
        read_source(tmp_path / "half.pt", HEADS, EPS)
    plain = BEiT3(ModelConfig(**vars(CONFIG) | {"word_norm": False}))
    save_model_folder(tmp_path / "plain", dict(plain.named_parameters()), plain.config)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "plain"), str(tmp_path / "x.pth"), "--to", "vlmo"])
    assert "VLMo's form is of a model with model.attention=shared" in capsys.readouterr().err
