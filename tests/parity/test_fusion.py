"""Fusion above two encoders (ALBEF's, mPLUG's) against torch's own attention, in fp64, and what rests in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from beit3_dist.checkpoint.formats import read_initial_weights
from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.checkpoint.timm_form import weights_to_timm
from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.beit3 import MixedInputs
from beit3_dist.model.decoding import decoder_of
from beit3_dist.model.embedding import VisionEmbedding
from beit3_dist.model.encoder import kind_of
from beit3_dist.model.text_decoder import decoder_group
from beit3_dist.model.token_layout import TokenLayout, fill, group, prefix_mask

ALBEF = ModelConfig(layers=5, width=32, heads=4, ffn_width=48, patch_size=8, image_size=16, attention="per_modality",
                    vl_expert_layers=0, fusion_layers=2, language_layers=2, vocab_size=60, visual_vocab_size=20,
                    max_text_length=16)  # fmt: skip
MPLUG = replace(ALBEF, layers=7, fusion_layers=4, connected_every=1)
LARGE = replace(MPLUG, layers=6, language_layers=0, vision_layers=2, vision_width=48, vision_heads=6, decoder_layers=2)
"""With an image encoder of its own width, and a decoder."""
BERT = dict(word_norm=True, post_norm=True)
ALL = [ALBEF, MPLUG, LARGE, replace(MPLUG, **BERT), replace(LARGE, **BERT)]
NAMES = ["ALBEF", "mPLUG", "mPLUG-large", "mPLUG-BERT", "mPLUG-large-BERT"]
PADDING = torch.arange(6) >= torch.tensor([6, 2, 4])[:, None]
close = torch.testing.assert_close


def built(config: ModelConfig) -> BEiT3:
    """With values of ordinary size: initial biases are zero and would hide mistakes."""
    model, draw = BEiT3(config).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def samples() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 16, 16, generator=draw, dtype=torch.float64), torch.randint(4, 60, (3, 6), generator=draw)


def attended(
    module: nn.Module, side: str, q: Tensor, kv: Tensor, hidden: Tensor | None, keys: str = "", later: bool = False
) -> Tensor:
    """torch's multi-head attention with the module's weights. `later`: what comes later is hidden, too."""
    width, mask = q.shape[2], torch.ones(q.shape[1], kv.shape[1], dtype=torch.bool).triu(1) if later else None
    parts = [module.q[side], module.k[keys or side], module.v[keys or side]]
    weight, bias = (torch.cat([getattr(part, kind) for part in parts]) for kind in ("weight", "bias"))
    out = module.out[side]
    return nn.functional.multi_head_attention_forward(
        *(x.transpose(0, 1) for x in (q, kv, kv)), width, width // 8, weight, bias, None, None, False, 0.0, out.weight,
        out.bias, key_padding_mask=hidden, need_weights=False, attn_mask=mask,
    )[0].transpose(0, 1)  # fmt: skip


def residual(x: Tensor, norm: nn.Module, behind: bool, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """x + branch(norm(x)), or norm(x + branch(x))."""
    return norm(x + branch(x)) if behind else x + branch(norm(x))


def own_attention(
    x: Tensor, block: nn.Module, side: str, hidden: Tensor | None, post: bool, later: bool = False
) -> Tensor:
    norm = block.attention_norm[side]
    return residual(x, norm, post, lambda x: attended(block.attention, side, x, x, hidden, later=later))


def fed(x: Tensor, ffn: nn.Module, post: bool = False) -> Tensor:
    return residual(x, ffn.norm, post, lambda x: ffn.fc2(gelu(ffn.fc1(x))))


def looking(w: Tensor, block: nn.Module, v: Tensor, hidden: Tensor | None, post: bool, later: bool = False) -> Tensor:
    """A layer of words w that look at v."""
    w, keys = (
        own_attention(w, block, "language", None if later else PADDING, post, later),
        block.cross_norm["vision"](v),
    )
    w = residual(w, block.cross_norm["language"], post, lambda w: attended(
        block.cross_attention, "language", w, keys, hidden, "vision"))  # fmt: skip
    return fed(w, block.ffn["language"], post)


def plain(model: BEiT3, pictures: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, layer by layer, over padded samples."""
    embedding, post = model.vision_embedding, model.config.post_norm
    v = VisionEmbedding.forward(embedding, pictures)
    if model.config.vision_layers:
        for block in embedding.blocks.values():
            v = fed(own_attention(v, block, "vision", None, False), block.ffn["vision"])
        v = embedding.bridge_norm(embedding.bridge(v))
    words = model.language_embedding
    w = words.words.weight[text] + words.positions[2:8]
    w = words.norm(w) if post else w
    for layer, block in model.blocks.items():
        kind = kind_of(model.config, int(layer))
        if kind in ("images", "alone"):
            v = fed(own_attention(v, block, "vision", None, False), block.ffn["vision"])
        if kind in ("words", "alone"):
            w = fed(own_attention(w, block, "language", PADDING, post), block.ffn["language"], post)
        elif kind == "co_attention":
            w = looking(w, block, v, None, post)
        elif kind == "connected":
            hidden = torch.cat([PADDING.new_zeros(3, v.shape[1]), PADDING], dim=1)
            x = own_attention(torch.cat([v, w], dim=1), block, "shared", hidden, post)
            x = fed(x, block.ffn["shared"], post)
            v, w = v + x[:, : v.shape[1]], x[:, v.shape[1] :]
    return model.image_norm(v), model.text_norm(w)[~PADDING]


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_pairs_are_fused_as_defined(config: ModelConfig) -> None:
    model, (pictures, text) = built(config), samples()
    found = model.encode(pictures, text, PADDING)
    ours, theirs = (found[:, :5], found[:, 5:][~PADDING]), plain(model, pictures, text)
    close(ours, theirs)
    draw = torch.Generator().manual_seed(2)
    toward = [torch.randn(part.shape, generator=draw, dtype=torch.float64) for part in ours]
    leaves = [p for name, p in model.named_parameters() if not re.search(r"head|mask_token|^decoder", name)]
    gradients = [
        torch.autograd.grad(sum((part * to).sum() for part, to in zip(parts, toward, strict=True)), leaves)
        for parts in (ours, theirs)
    ]
    close(*gradients)


@pytest.mark.parametrize("config", [ALBEF, MPLUG], ids=["ALBEF", "mPLUG"])
def test_what_is_alone_never_meets_and_rests_in_fusion(config: ModelConfig) -> None:
    """Images and texts alone are what the encoders below fusion make of them."""
    model, (pictures, text) = built(config), samples()
    below = BEiT3(replace(config, layers=config.lower_layers + 1, fusion_layers=1, connected_every=0)).double()
    below.load_state_dict({n: p for n, p in model.state_dict().items() if n in below.state_dict()})
    close(model.encode(pictures), below.encode(pictures))
    close(model.encode(text=text), below.encode(text=text))
    fused = model.encode(pictures, text)[:, :5]
    assert torch.allclose(fused, model.encode(pictures)) == (config is ALBEF)


def test_words_of_no_pair_change_nothing() -> None:
    """A mixed micro-batch whose captions are filled up, as on a GPU."""
    model, (pictures, text) = built(MPLUG), samples()
    groups = (group(2, 5, None), group(3, 5, PADDING, 6), group(2, 0, None, 4))
    hidden = []
    for some in (groups, fill(groups, [1], 7)):
        layout = TokenLayout(some)
        words = layout.packed([text, text[:2, :4]])
        inputs = MixedInputs(torch.cat([pictures[:2], pictures]), words, layout)
        own = torch.cat([torch.full((size,), True) for size in layout.segments[:2]] + [
            torch.full((g.real_words,), not g.filler) for g in layout.word_groups
        ])  # fmt: skip
        hidden.append(model.hidden(inputs)[own])
    assert len(groups) < len(fill(groups, [1], 7))
    close(hidden[0], hidden[1])


def test_no_word_sees_a_later_one_behind_its_prefix() -> None:
    """Prefix language modelling over fusion layers: a change of the last word changes no hidden state before it."""
    model, (pictures, text) = built(MPLUG), samples()
    mask = prefix_mask(5, 6, torch.tensor([0, 2, 3]))
    changed = text.clone()
    changed[:, -1] = (changed[:, -1] + 7) % 60
    one, other = (model.encode(pictures, some, attention_mask=mask) for some in (text, changed))
    close(one[:, :-1], other[:, :-1])
    assert not torch.allclose(one[:, -1], other[:, -1])


@pytest.mark.parametrize("config", [ALBEF, MPLUG], ids=["ALBEF", "mPLUG"])
def test_two_encoders_are_a_start(config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of both modalities, as from CLIP, or of images alone, as from DeiT."""
    towers = replace(config, layers=3, fusion_layers=0, connected_every=0, language_layers=0)
    config = replace(config, language_layers=0)
    weights = {name: p.detach() + 0.25 for name, p in BEiT3(towers).named_parameters()}
    save_model_folder(tmp_path / "towers", weights, towers)
    torch.save(weights_to_timm(weights, towers), tmp_path / "vit.pth")
    for source in ("towers", "vit.pth"):
        caplog.clear()
        found = read_initial_weights(tmp_path / source, config)
        assert all(torch.equal(v, weights[name]) for name, v in found.items() if "positions" not in name)
        assert (
            not any(re.match(r"blocks\.[3-6]\.", name) for name in found) and "blocks.2.ffn.vision.fc1.weight" in found
        )
        assert "has no weights for the fusion layers: initial values are taken" in caplog.text
    with pytest.raises(ValueError, match=r"it has no blocks\.3\.cross_attention\.k\.vision\.bias"):
        damaged = dict(BEiT3(config).named_parameters())
        del damaged["blocks.3.cross_attention.k.vision.bias"]
        save_model_folder(tmp_path / "damaged", damaged, config)
        read_initial_weights(tmp_path / "damaged", config)


@pytest.mark.parametrize("config", [LARGE, replace(LARGE, **BERT)], ids=["pre-norm", "post-norm"])
def test_the_decoder_writes_as_defined(config: ModelConfig) -> None:
    """Of texts of other lengths, after images and words of other lengths; one by one it tells the same."""
    model, (pictures, text) = built(config), samples()
    memory = model.encode(pictures, text, PADDING)
    written, after = text.flip(1)[:, :5], torch.arange(5) >= torch.tensor([3, 5, 4])[:, None]
    group = decoder_group(torch.cat([PADDING.new_ones(3, 5), ~PADDING], dim=1), after)
    places = torch.arange(5).expand(3, 5)
    found = model.decoder(memory, written[~after], places[~after], group)
    decoder = model.decoder
    w = decoder.embedding(written.flatten(), places.flatten()).unflatten(0, (3, 5))
    hidden = torch.cat([PADDING.new_zeros(3, 5), PADDING], dim=1)
    for block in decoder.blocks.values():
        w = looking(w, block, memory, hidden, config.post_norm, later=True)
    close(found, decoder.norm(w)[~after])

    writer, images = decoder_of(model, pictures, 2, 5), model.encode(pictures, text[:, :1])
    said = torch.randint(4, 60, (3, 2, 5), generator=torch.Generator().manual_seed(3))
    said[:, 0, 0] = said[:, 1, 0] = text[:, 0]
    swapped = torch.tensor([[1, 0]]).expand(3, 2)
    whole = [
        decoder(
            images,
            said[:, k].flatten(),
            places.flatten(),
            decoder_group(PADDING.new_ones(3, images.shape[1]), PADDING.new_zeros(3, 5)),
        ).unflatten(0, (3, 5))
        for k in range(2)
    ]
    for step in range(5):
        logits = writer.step(said[:, :, step] if step < 2 else said[:, :, step].flip(1))
        expected = torch.stack([model.text_head.logits(one[:, step]) for one in whole], dim=1)
        close(logits, expected if step < 2 else expected.flip(1))
        if step == 1:
            writer.follow(swapped)


def test_what_cannot_be_is_refused() -> None:
    for changes, message in (
        ({"ffn": "shared"}, r"model\.fusion_layers=2 stand above two encoders: use model\.attention=per_modality"),
        ({"layers": 2}, r"model\.fusion_layers=2 stand above"),
        ({"fusion_layers": 0}, r"model\.connected_every and model\.language_layers are of a model with"),
        (
            {"fusion_layers": 0, "language_layers": 0, "decoder_layers": 2},
            r"model\.decoder_layers and model\.vision_layers",
        ),
        ({"vision_layers": 2, "language_layers": 0}, r"model\.vision_width must be positive"),
        ({"vision_width": 48}, r"model\.vision_width and model\.vision_heads are of an image encoder, but"),
        ({"vision_layers": 2, "vision_width": 48, "vision_heads": 5}, r"48 is not divisible by model\.vision_heads=5"),
        ({"vision_layers": 2, "vision_width": 48, "vision_heads": 6}, r"model\.language_layers=2: with model\.vision"),
        ({"post_norm": True}, r"model\.post_norm is of a model with model\.fusion_layers and model\.word_norm"),
        ({"language_layers": 4}, r"model\.language_layers=4 exceeds the 3 layers below fusion"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(ALBEF, **changes)
    with pytest.raises(ValueError, match="without model.decoder_layers writes no captions"):
        decoder_of(BEiT3(ALBEF), torch.zeros(1, 3, 16, 16), 1, 4)
