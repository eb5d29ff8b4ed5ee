"""Image encoders of timm, and BERT by its definition, compute the same in a model that starts from them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from beit3_dist.checkpoint.formats import read_initial_weights, read_source
from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3

LAYERS, WIDTH, HEADS, WORDS, LENGTH, EPS = 3, 32, 4, 60, 16, 1e-6
ALBEF = ModelConfig(layers=5, width=WIDTH, heads=HEADS, ffn_width=4 * WIDTH, patch_size=8, image_size=32,
                    attention="per_modality", vl_expert_layers=0, fusion_layers=2, language_layers=1, vocab_size=WORDS,
                    visual_vocab_size=20, max_text_length=LENGTH, word_norm=True, post_norm=True,
                    layer_norm_eps=EPS)  # fmt: skip
MPLUG = replace(ALBEF, layers=3, fusion_layers=2, connected_every=1, language_layers=0, decoder_layers=2,
                vision_layers=3, vision_width=48, vision_heads=6)  # fmt: skip
IMAGES = {
    "vit": {},
    "deit3": {"init_values": 0.3},
    "beit": {"use_abs_pos_emb": True, "init_values": 0.3},
}


def stirred(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of ordinary size everywhere, so that none hides."""
    draw = torch.Generator().manual_seed(0)
    return {key: value + 0.1 * torch.randn(value.shape, generator=draw) for key, value in state.items()}


def timms(kind: str, width: int, heads: int) -> Any:
    """A model of timm's for images of 32 pixels, without a classifier."""
    made = timm.models.Beit if kind == "beit" else timm.models.VisionTransformer
    model = made(img_size=32, patch_size=8, embed_dim=width, depth=LAYERS, num_heads=heads, num_classes=0,
                 global_pool="token" if kind == "beit" else "", **IMAGES[kind]).eval()  # fmt: skip
    model.load_state_dict(stirred(model.state_dict()))
    return model


def bert(layers: int, words: int = WORDS) -> dict[str, Tensor]:
    """A state dict with the keys of Hugging Face's BertForPreTraining."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (words, WIDTH),
        "embeddings.position_embeddings.weight": (LENGTH + 3, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.gamma": (WIDTH,), "embeddings.LayerNorm.beta": (WIDTH,),
        "pooler.dense.weight": (WIDTH, WIDTH),
    }  # fmt: skip
    for layer in range(layers):
        matrices = {f"attention.self.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
        matrices |= {"attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (4 * WIDTH, WIDTH)}
        for name, shape in (matrices | {"output.dense": (WIDTH, 4 * WIDTH)}).items():
            shapes |= {f"encoder.layer.{layer}.{name}.weight": shape, f"encoder.layer.{layer}.{name}.bias": shape[:1]}
        for name in ("attention.output", "output"):
            norm = f"encoder.layer.{layer}.{name}.LayerNorm"
            shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    state = {f"bert.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    return stirred(state | {"cls.predictions.bias": torch.zeros(words)})


def bert_encoded(state: dict[str, Tensor], text: Tensor, padding: Tensor, layers: int) -> Tensor:
    """BERT (Devlin et al. 2019), [B, L, D]."""

    def at(name: str) -> Tensor:
        return state[f"bert.{name}"]

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, at(f"{name}.weight"), at(f"{name}.bias"))

    def normed(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (WIDTH,), at(f"{name}.LayerNorm.weight"), at(f"{name}.LayerNorm.bias"), EPS)

    x = at("embeddings.word_embeddings.weight")[text] + at("embeddings.position_embeddings.weight")[: text.shape[1]]
    x = x + at("embeddings.token_type_embeddings.weight")[0]
    x = layer_norm(x, (WIDTH,), at("embeddings.LayerNorm.gamma"), at("embeddings.LayerNorm.beta"), EPS)
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            dense(x, f"{name}.attention.self.{part}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=~padding[:, None, None, :]).transpose(1, 2).flatten(2)
        x = normed(x + dense(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output")
        wide = gelu(dense(x, f"{name}.intermediate.dense"))
        x = normed(x + dense(wide, f"{name}.output.dense"), f"{name}.output")
    return x


def started(config: ModelConfig, *paths: Path) -> tuple[BEiT3, dict[str, Tensor]]:
    found = read_initial_weights([str(path) for path in paths], config)
    model = BEiT3(config)
    model.load_state_dict(found, strict=False)
    return model.eval(), found


@torch.no_grad()
@pytest.mark.parametrize("kind", IMAGES)
def test_timms_image_encoders(kind: str, tmp_path: Path) -> None:
    """Below fusion, and as an encoder of its own width."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    theirs = timms(kind, WIDTH, HEADS)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    model, found = started(ALBEF, tmp_path / "vit.pth")
    torch.testing.assert_close(model.encode(pixels), theirs.forward_features(pixels), rtol=1e-5, atol=1e-5)
    assert not any("language" in name or "cross" in name for name in found)

    wide = timms(kind, 48, 6)
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    model, found = started(MPLUG, tmp_path / "wide.safetensors")
    seen: list[Tensor] = []
    model.vision_embedding.bridge.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    wide.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.encode(pixels)
    wide.forward_features(pixels)
    torch.testing.assert_close(seen[0].view_as(seen[1]), seen[1], rtol=1e-5, atol=1e-5)
    assert all(name.startswith("vision_embedding.") for name in found)


@torch.no_grad()
@pytest.mark.parametrize(("config", "layers"), [(ALBEF, 3), (MPLUG, 4)], ids=["ALBEF", "mPLUG"])
def test_bert(config: ModelConfig, layers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Beside a Vision Transformer: the layers below fusion compute what BERT's first ones do, the others are those of
    fusion, and a decoder has them from the first one on."""
    state = bert(layers)
    torch.save(state, tmp_path / "bert.bin")
    torch.save(
        timms("vit", config.vision_width or WIDTH, config.vision_heads or HEADS).state_dict(), tmp_path / "vit.pth"
    )
    model, found = started(config, tmp_path / "vit.pth", tmp_path / "bert.bin")
    text = torch.randint(4, WORDS, (3, 9), generator=torch.Generator().manual_seed(2))
    padding = torch.arange(9) >= torch.tensor([9, 4, 7])[:, None]
    expected = bert_encoded(state, text, padding, layers=1)
    torch.testing.assert_close(model.encode(text=text, text_padding=padding)[~padding], expected[~padding],
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    missing = {name for name, _ in model.named_parameters()} - found.keys()
    assert all(re.search(r"cross|head|mask_token|bridge|^norm", name) for name in missing)
    query = "attention.self.query.weight"
    for layer, side in ((1, "language"), (2, "language" if config is ALBEF else "shared")):
        first = config.lower_layers - 1  # the last of words alone
        ours = found[f"blocks.{first + layer}.attention.q.{side}.weight"]
        assert torch.equal(ours, state[f"bert.encoder.layer.{layer}.{query}"])
    if config.decoder_layers:
        for layer in range(2):
            ours = found[f"decoder.blocks.{layer}.attention.q.language.weight"]
            assert torch.equal(ours, state[f"bert.encoder.layer.{layer}.{query}"])
    assert "need a text tokenizer with the same ids" in caplog.text


def test_what_does_not_fit_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(bert(2), tmp_path / "bert.bin")
    cases = [
        (replace(ALBEF, post_norm=False), r"give model\.post_norm=true"),
        (ALBEF, r"words pass 3 layers, but it has 2"),
        (
            replace(MPLUG, layers=2, decoder_layers=3, fusion_layers=1),
            r"model\.decoder_layers has 3 layers, but it has 2",
        ),
        (
            replace(ALBEF, fusion_layers=1, layers=4, max_text_length=20),
            r"19 positions of words, fewer than model\.max",
        ),
        (replace(ALBEF, fusion_layers=1, layers=4, ffn_width=64), r"ffn\.language\.fc1.* has shape \[128, 32\]"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=rf"^init_from.*bert\.bin.*{message}|{message}"):
            read_initial_weights(tmp_path / "bert.bin", config)
    with pytest.raises(ValueError, match=r"bert\.bin holds BERT's weights, .*: name it in init_from"):
        read_source(tmp_path / "bert.bin", HEADS)
    torch.save(
        bert(2) | {"bert.encoder.layer.0.crossattention.self.key.weight": torch.zeros(1)}, tmp_path / "other.bin"
    )
    two = replace(ALBEF, fusion_layers=1, layers=4)
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.crossattention\.self\.key\.weight is no key of BERT"):
        read_initial_weights(tmp_path / "other.bin", two)
    torch.save(bert(2, words=WORDS + 2), tmp_path / "larger.bin")
    assert "language_embedding.words.weight" not in read_initial_weights(tmp_path / "larger.bin", two)
    assert f"its {WORDS + 2} word vectors are not used: there are {WORDS} words" in caplog.text
    relative = timm.models.Beit(img_size=32, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=HEADS, num_classes=0,
                                use_rel_pos_bias=True, init_values=0.1)  # fmt: skip
    torch.save(relative.state_dict(), tmp_path / "beit.pth")
    with pytest.raises(ValueError, match=r"relative_position_bias_table: its positions are relative"):
        read_initial_weights(tmp_path / "beit.pth", ALBEF)


def test_shapes_that_bert_has_not_are_the_files_mistake(tmp_path: Path) -> None:
    path, positions = tmp_path / "bert.safetensors", torch.zeros(40)
    save_file(bert(LAYERS) | {"bert.embeddings.position_embeddings.weight": positions}, path)
    with pytest.raises(ValueError, match=f"^init_from: {path}: "):
        read_initial_weights(path, ALBEF)
