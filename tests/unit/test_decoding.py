"""Writing with a cache, against encoding everything again at every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.decoding import Decoder, Questions, caption_mask, decoder_of
from beit3_dist.model.text_decoder import decoder_group
from beit3_dist.model.token_layout import prefix_mask
from tests.equality import assert_close

MASK = 59
TINY = dict(
    layers=3,
    width=32,
    heads=4,
    ffn_width=48,
    patch_size=8,
    image_size=16,
    vocab_size=60,
    visual_vocab_size=20,
    max_text_length=12,
)
ARCHITECTURES = {
    "paper": ModelConfig(**TINY, attention="shared", vl_expert_layers=1),
    "released": ModelConfig(**TINY, attention="per_modality", sub_layernorm=True, vl_expert_layers=0),
}


WRITING = replace(ARCHITECTURES["released"], sub_layernorm=False, fusion_layers=2, decoder_layers=2)


def model_of(architecture: str) -> BEiT3:
    """Weights of ordinary size: the initial ones are so small that words would hardly depend on one another."""
    model, draw = BEiT3(ARCHITECTURES.get(architecture, WRITING)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.requires_grad_(False)


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def plain_logits(model: BEiT3, images: Tensor, words: Tensor, asked: int | None = MASK) -> Tensor:
    """Logits [B, V] of the word after words [B, n], by encoding picture, words and a mask from the beginning."""
    text = words if asked is None else torch.cat([words, torch.full((len(words), 1), asked)], dim=1)
    mask = caption_mask(1 + model.config.patches, text.shape[1])
    return model.text_head.logits(model.encode(images, text, attention_mask=mask)[:, -1])


def test_the_four_blocks_of_the_mask() -> None:
    may = caption_mask(patches=2, words=3)
    assert may.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("asked", [MASK, None], ids=["at a mask", "at the last word"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_changes_nothing(architecture: str, asked: int | None) -> None:
    """Several captions of each picture, each going on from a random one of the step before."""
    model, images, captions, steps = model_of(architecture), pictures(2), 3, 7
    draw = torch.Generator().manual_seed(2)
    decoder = Decoder(model, images, captions, max_words=steps)
    words = torch.zeros(2, captions, 1, dtype=torch.int64)
    repeated = images.repeat_interleave(captions, 0)
    for step in range(steps):
        logits = decoder.step(words[:, :, -1], asked)
        expected = plain_logits(model, repeated, words.flatten(0, 1), asked)
        assert_close(logits.flatten(0, 1), expected, f"logits of step {step}")
        assert step == 0 or (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3, "the captions are all alike"
        origins = torch.randint(captions, (2, captions), generator=draw)
        decoder.follow(origins)
        words = words.gather(1, origins[:, :, None].expand_as(words))
        words = torch.cat([words, torch.randint(4, 50, (2, captions, 1), generator=draw)], dim=2)


def test_attention_is_as_before_afterwards() -> None:
    model, images = model_of("paper"), pictures(1)
    text = torch.tensor([[0, 7, 8, 2]])
    before = model.encode(images, text)
    Decoder(model, images, 2, max_words=3).step(torch.zeros(1, 2, dtype=torch.int64), MASK)
    assert torch.equal(model.encode(images, text), before)
    with pytest.raises(ValueError, match="pixels"):
        Decoder(model, torch.zeros(1, 3, 8, 8), 2, max_words=3)
    assert torch.equal(model.encode(images, text), before)


def test_a_caption_without_positions_is_refused() -> None:
    model = model_of("paper")
    Decoder(model, pictures(1), 1, max_words=11)
    with pytest.raises(ValueError, match="12 words.*max_text_length=12"):
        Decoder(model, pictures(1), 1, max_words=12)


def test_torchscales_cache() -> None:
    """The same logits as torchscale's own incremental decoding, its mask's entry dropped by hand."""
    from beit3_dist.checkpoint.formats import to_released
    from tests.parity.oracle import torchscale_beit3

    model, images = model_of("released"), pictures(2)
    theirs = torchscale_beit3(model.config)
    theirs.load_state_dict(to_released(model), strict=True)
    theirs.eval()
    patches = 1 + model.config.patches
    sequence = torch.randint(4, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    sequence[:, 0] = 0

    decoder = Decoder(model, images, 1, max_words=6)
    cache: dict[int, dict] = {layer: {} for layer in range(model.config.layers)}
    for step in range(6):
        pair = torch.stack([sequence[:, step], torch.full((2,), MASK)], dim=1)
        blocked = (~caption_mask(patches, step + 2)).float() * -1e8
        first = step == 0
        with torch.no_grad():
            # Their tables begin at row 2; unlike ours, a step's positions are given from outside.
            out = theirs.beit3(
                textual_tokens=pair,
                visual_tokens=images if first else None,
                attn_mask=blocked if first else blocked[-2:],
                incremental_state=cache,
                positions=None if first else torch.tensor([[step + 2, step + 3]]),
            )["encoder_out"]
        for entry in cache.values():
            entry["prev_key"], entry["prev_value"] = entry["prev_key"][:, :, :-1], entry["prev_value"][:, :, :-1]
        expected = theirs.mlm_head(out[:, -1])
        assert_close(decoder.step(sequence[:, step, None], MASK)[:, 0], expected, f"logits of step {step}")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "with a decoder"])
def test_answers_follow_questions_of_any_length(architecture: str) -> None:
    """Against encoding image, question and answer anew, each question by itself; captions swap places on the way."""
    model, images, lengths, captions = model_of(architecture), pictures(3), [5, 2, 4], 2
    draw = torch.Generator().manual_seed(3)
    asked = torch.randint(4, 50, (3, max(lengths)), generator=draw)
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    decoder = decoder_of(model, images, captions, 4, Questions(asked.where(~padding, 1), padding))
    words = torch.zeros(3, captions, 1, dtype=torch.int64)
    for step in range(4):
        logits = decoder.step(words[:, :, -1], None)
        for row, length in enumerate(lengths):
            question, image = asked[row : row + 1, :length], images[row : row + 1]
            for caption in range(captions):
                answer = words[row, caption][None]
                expected = answered(model, image, question, answer)
                assert_close(logits[row, caption], expected, f"logits of step {step}")
        assert step == 0 or (logits[:, 0] - logits[:, 1]).abs().max() > 1e-3, "the answers are all alike"
        origins = torch.randint(captions, (3, captions), generator=draw)
        decoder.follow(origins)
        words = words.gather(1, origins[:, :, None].expand_as(words))
        words = torch.cat([words, torch.randint(4, 50, (3, captions, 1), generator=draw)], dim=2)
    if not model.config.decoder_layers:  # whose positions are its own
        with pytest.raises(ValueError, match="a question of 5 tokens and an answer of 9 words"):
            decoder_of(model, images, captions, 9, Questions(asked, padding))


def answered(model: BEiT3, image: Tensor, question: Tensor, answer: Tensor) -> Tensor:
    """Logits [V] of the word after an answer that begins with <s>."""
    patches, length = 1 + model.config.patches, answer.shape[1]
    if model.config.decoder_layers:
        memory = model.encode(image, question)
        group = decoder_group(torch.ones(memory.shape[:2], dtype=torch.bool), torch.zeros(1, length, dtype=torch.bool))
        hidden = model.decoder(memory, answer.flatten(), torch.arange(length), group)
    else:
        text = torch.cat([question, answer], dim=1)
        mask = prefix_mask(patches, text.shape[1], torch.tensor([question.shape[1]]))
        hidden = model.encode(image, text, attention_mask=mask)[0]
    return model.text_head.logits(hidden[-1])
