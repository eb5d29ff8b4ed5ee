"""What a model makes of the hidden parts of images and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.image_tokenizer.drawing import mosaic
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.objectives.together import Objectives

GREY, GREY_EDGE = 150, 172
"""Levels of hidden patches and of two of their edges, which tell them from a grey image."""


@dataclass(frozen=True)
class Piece:
    """A piece of a caption as the text tokenizer cuts it."""

    text: str
    """With a space in front where it begins a word."""
    guess: str | None = None
    """What the model takes a hidden piece for; None: it is not hidden."""


@dataclass(frozen=True)
class Example:
    """An image, with or without a caption, and what the model makes of its hidden parts."""

    image: Tensor
    """uint8 [3, S, S]."""
    hidden: Tensor
    """bool [patches]."""
    codes: Tensor
    """int64 [patches]: the true codes."""
    guesses: Tensor
    """int64 [patches]: the model's codes at hidden patches, the true ones elsewhere."""
    caption: Sequence[Piece] = ()
    """Empty for an image of the image stream."""


def guess(
    model: BEiT3,
    masked: MaskedDataModeling,
    batch: MicroBatch,
    codes: Tensor,
    config: RunConfig,
    words_of: TextTokenizer,
) -> dict[str, Example]:
    """The examples of a micro-batch with one image, one pair or both, by the name of their loss. `codes`: int64
    [I, patches] on the model's device; `masked` is not one that trains beside others."""
    inputs, reading, _ = Objectives(config, [masked]).prepare(batch, codes.device, codes)
    assert reading is not None
    hidden_MD = model.hidden(inputs)[reading.selection.rows]
    guessed = {name: some.cpu() for name, some in masked.guesses(model, hidden_MD, reading.targets[0]).items()}
    seen, found = SeenImages(batch, torch.device("cpu")), {}
    pixels, true = seen.by_stream(seen.model), seen.by_stream(codes.cpu())
    for stream, name in (("images", "image"), ("pairs", "pair_image")):
        if name in guessed:
            hidden, codes_P = batch.streams[stream].annotations[masked.name]["image_mask"][0], true[stream][0]
            filled = codes_P.masked_scatter(hidden, guessed[name])
            found[name] = Example(pixels[stream][0], hidden, codes_P, filled)
    if "pair_image" in found:
        samples = batch.streams["pairs"]
        assert samples.text is not None and samples.lengths is not None
        words = samples.text[0, : int(samples.lengths[0])]
        mask = samples.annotations[masked.name]["text_mask"][0, : len(words)]
        guesses = words.masked_scatter(mask, guessed.get("pair_text", words[:0]))
        pieces = pieces_of(words_of, words, mask, guesses)
        found["pair_image"] = replace(found["pair_image"], caption=pieces)
    return found


def pieces_of(tokenizer: TextTokenizer, words: Tensor, mask: Tensor, guesses: Tensor) -> list[Piece]:
    """The caption without <s> and </s>, from the words [L], which of them are hidden, and what is guessed there."""
    each = zip(words.tolist()[1:-1], mask.tolist()[1:-1], guesses.tolist()[1:-1], strict=True)
    of = partial(spelled, tokenizer)
    return [Piece(of(true), of(guess) if hidden else None) for true, hidden, guess in each]


def in_brackets(caption: Sequence[Piece]) -> str:
    """Words as they are, hidden ones as [guess] where it is right and else as [guess→truth]."""
    result = ""
    for piece in caption:
        told = piece.text
        if piece.guess is not None:
            right = piece.guess == piece.text
            told = f"[{'' if right else piece.guess.strip() + '→'}{piece.text.strip()}]"
            told = " " * piece.text.startswith(" ") + told
        result += told
    return result.strip()


def spelled(tokenizer: TextTokenizer, word: int) -> str:
    """A word id as text, with a space in front where it begins a word."""
    if word in tokenizer.words:
        return tokenizer.spelled(word)
    names = {tokenizer.bos: "<s>", tokenizer.pad: "<pad>", tokenizer.eos: "</s>", tokenizer.unk: "<unk>"}
    return f" {names.get(word, '<spare>')}"


def tiles(example: Example, looks: Tensor) -> list[np.ndarray]:
    """The original, the masked input, and the hidden patches from guessed and from true codes: uint8 [S, S, 3] each."""
    grey = torch.full_like(looks[:1], GREY)
    grey[..., 0, :] = grey[..., :, 0] = GREY_EDGE
    everywhere = torch.cat([torch.zeros_like(grey), torch.ones_like(grey)])
    hidden = mosaic(example.hidden[None].long(), everywhere)[0].bool()
    fills = ((torch.zeros_like(example.codes), grey), (example.guesses, looks), (example.codes, looks))
    filled = [torch.where(hidden, mosaic(codes[None], patches)[0], example.image) for codes, patches in fills]
    return [image.permute(1, 2, 0).numpy() for image in (example.image, *filled)]


def codes_right(shown: list[Example]) -> float | None:
    """Share of the hidden patches whose code the model guesses; None where nothing is hidden."""
    hits = torch.cat([(example.guesses == example.codes)[example.hidden] for example in shown])
    return float(hits.float().mean()) if len(hits) else None
