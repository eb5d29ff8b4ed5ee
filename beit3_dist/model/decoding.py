"""Writing about images, word by word, with a cache of keys and values.

A caption is written in UniLM's order (Dong et al. 2019): patches see no words and a word sees no later ones, so keys
and values of the image and of written words never change, and a step runs what is new alone. The next word is asked
for in the form that the model was taught: at a <mask> in its place, which sees the words so far (UniLM's, and BEiT-3's
captioning), or at the last word (prefix language modelling). A model with a decoder of its own, which looks at an image
and <s>, writes by that. Where a question is asked about the image, its words and the patches see one another, and what
is written follows them.

Shape letters: B images, K captions of each image (beams), P its CLS + patches, H heads, d a head's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from beit3_dist.model.attention import joined, parted
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.token_layout import Group, TokenLayout, prefix_mask


def caption_mask(patches: int, words: int) -> Tensor:
    """UniLM's sequence-to-sequence mask, bool [N, N] for N = patches + words, True where a query may attend to a key.

    Patches see all patches and no words; a word sees all patches, itself and the words before it. `patches` counts
    CLS.
    """
    return prefix_mask(patches, words, torch.zeros(1, dtype=torch.int64))[0]


@dataclass(frozen=True)
class Questions:
    """What is asked about each of B images."""

    words: Tensor
    """int64 [B, L], framed by <s> and </s>, then padding."""
    padding: Tensor
    """bool [B, L], on the host."""

    @property
    def lengths(self) -> Tensor:
        """int64 [B], where the words are."""
        return (~self.padding).sum(1).to(self.words.device)

    def read(self, patches: int) -> Tensor:
        """bool [B, patches + L]: what is no padding, where the words are."""
        return torch.cat([self.padding.new_ones(len(self.padding), patches), ~self.padding], 1).to(self.words.device)


class Decoder:
    """K unfinished captions of each of B images, under one model.

    The images are encoded once, on construction, and their keys and values are kept once for all K captions: the
    words of an image's captions are the words of one sample, between whose captions attention is masked. Words lie
    step by step, so that a step's mask is overwritten by the word that takes its place.

    Only the model's modules are called, so their hooks (ZeRO-3, tensor parallelism) run; with a pipeline there is no
    whole model to call. Every call of `step` is one pass over all blocks, whatever the words are.
    """

    def __init__(
        self, model: BEiT3, images: Tensor, captions: int, max_words: int, questions: Questions | None = None
    ) -> None:
        """`images`: [B, 3, S, S] in [-1, 1]. `max_words`: how often `step` can be called.

        Raises ValueError where the model has no positions for so many words.
        """
        asked = 0 if questions is None else questions.words.shape[1]
        _check_length(model, max_words, asked)
        self.model, self.captions, self.written = model, captions, 0
        self.samples, self.device = len(images), images.device
        patches = 1 + model.config.patches
        x_TD, read = model.vision_embedding(images).flatten(0, 1), None
        self._first = torch.zeros(self.samples, dtype=torch.int64, device=self.device)
        """[B]: position of the first word that is written."""
        if questions is not None:
            places = torch.arange(asked, device=self.device).repeat(self.samples)
            x_TD = torch.cat([x_TD, model.language_embedding(questions.words.flatten(), places)])
            self._first, read = questions.lengths, questions.read(patches)
        self._caches = [_Cache(patches + asked, captions, max_words + 1, read) for _ in model.blocks]
        self._run(x_TD, Group(self.samples, patches, asked, fused=True))

    def step(self, words: Tensor, mask: int | None) -> Tensor:
        """Logits [B, K, vocabulary] of each caption's next word, after its last word of `words`, int64 [B, K].

        The first step's words are <s>. `mask`: id of <mask>, at which the next word is asked for; None: at the last
        word itself.
        """
        asked = [words] if mask is None else [words, torch.full_like(words, mask)]
        new = torch.stack(asked, dim=1)  # [B, 1 or 2, K]
        places = torch.arange(self.written, self.written + len(asked), device=self.device)[:, None]
        positions = (self._first[:, None, None] + places).expand_as(new)
        embedded = self.model.language_embedding(new.flatten(), positions.flatten())
        hidden = self._run(embedded, Group(self.samples, 0, len(asked) * self.captions, fused=True))
        self.written += 1
        last = hidden.view(self.samples, len(asked), self.captions, -1)[:, -1]
        return self.model.text_logits(last.flatten(0, 1)).unflatten(0, (self.samples, self.captions))

    def follow(self, origins: Tensor) -> None:
        """Caption k of image b goes on from what was its caption origins[b, k]; int64 [B, K]."""
        for cache in self._caches:
            cache.follow(origins, self.written)

    def _run(self, x_TD: Tensor, group: Group) -> Tensor:
        """The blocks' output for the next tokens of every sample: its patches or its words."""
        with _remembering(self.model.blocks.values(), self._caches):
            return self.model.blocks(x_TD, TokenLayout((group,)), None)


class WritingDecoder:
    """The same by the model's own decoder. Image and <s>, or the question, are encoded once, by the first step, which
    knows <s>; of what the decoder looks at, keys and values are kept once for all K captions."""

    def __init__(
        self, model: BEiT3, images: Tensor, captions: int, max_words: int, questions: Questions | None = None
    ) -> None:
        """As `Decoder`."""
        _check_length(model, max_words)
        self.model, self.images, self.captions, self.written = model, images, captions, 0
        self._questions = questions
        self._caches = [_Cache(0, captions, max_words) for _ in model.decoder.blocks]
        self._kept: list[list[Tensor]] = [[] for _ in self._caches]
        self._memory = torch.empty(0)

    def step(self, words: Tensor, mask: int | None = None) -> Tensor:
        """As `Decoder.step`. The next word is asked for at the last one."""
        asked, read = self._questions, None
        if self.written == 0:
            given = (words[:, :1], None) if asked is None else (asked.words, asked.padding)
            self._memory = self.model.encode(self.images, *given)
        if asked is not None:
            read = asked.read(1 + self.model.config.patches)[:, None, None]
        group = Group(len(self.images), self._memory.shape[1], self.captions, None, read, read is None, fused=True)
        positions, blocks = torch.full_like(words.flatten(), self.written), self.model.decoder.blocks.values()
        with _remembering(blocks, self._caches, self._kept):
            hidden = self.model.decoder(self._memory, words.flatten(), positions, group)
        self.written += 1
        return self.model.text_head(hidden).unflatten(0, words.shape)

    def follow(self, origins: Tensor) -> None:
        """As `Decoder.follow`."""
        for cache in self._caches:
            cache.follow(origins, self.written)


def decoder_of(
    model: BEiT3, images: Tensor, captions: int, max_words: int, questions: Questions | None = None
) -> Decoder | WritingDecoder:
    """What writes `captions` captions of each image, or answers. Raises ValueError where the model cannot."""
    if model.config.decoder_layers:
        return WritingDecoder(model, images, captions, max_words, questions)
    if model.config.fusion_layers:
        raise ValueError(
            "a model with model.fusion_layers and without model.decoder_layers writes no captions: nothing keeps what "
            "its words look at"
        )
    return Decoder(model, images, captions, max_words, questions)


def _check_length(model: BEiT3, max_words: int, asked: int = 0) -> None:
    if asked + max_words >= model.config.max_text_length:
        what = f"a question of {asked} tokens and an answer" if asked else "captions"
        raise ValueError(
            f"{what} of {max_words} words and <s> are longer than model.max_text_length={model.config.max_text_length}"
        )


class _Cache:
    """Keys and values of one block, and attention to them."""

    def __init__(self, patches: int, captions: int, steps: int, read: Tensor | None = None) -> None:
        """`patches`: tokens before what is written; `read` bool [B, patches], True where one is no padding."""
        self.patches, self.captions, self.read = patches, captions, None if read is None else read[:, None, None]
        self.capacity = patches + captions * steps
        self.length = 0
        """Tokens that stay: patches, then words, K a step."""
        self.keys = self.values = torch.empty(0)
        """[B, H, capacity, d], allocated by the first call, which knows the kind of tensor."""

    def __call__(
        self, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], layout: TokenLayout
    ) -> list[Tensor]:
        """`attention.attend` for new tokens [B * n, H, d] that also see what is remembered. All patches stay; of
        words, only the first of those that a caption gets in a step."""
        (group,) = layout.groups
        sizes = [group.samples * group.patches, group.samples * group.words]
        parts = (torch.cat(slices).split(sizes) for slices in (queries, keys, values))
        q, k, v = (joined(patches, words, group) for patches, words in parts)
        start, end = self.length, self.length + q.shape[2]
        if start == 0:
            self.keys = k.new_empty(*k.shape[:2], self.capacity, k.shape[3])
            self.values = torch.empty_like(self.keys)
        self.keys[:, :, start:end], self.values[:, :, start:end] = k, v
        mixed = scaled_dot_product_attention(
            q, self.keys[:, :, :end], self.values[:, :, :end], attn_mask=self._mask(start, end, q.device)
        )
        self.length = end if start == 0 else start + self.captions
        return list(torch.cat(parted(mixed, group)).split([len(part) for part in queries]))

    def _mask(self, start: int, end: int, device: torch.device) -> Tensor | None:
        """Which of the tokens [0, end) those of [start, end) see; None: all."""
        if start < self.patches:
            return self.read
        token = torch.arange(self.patches, end, device=device) - self.patches
        step, caption = token // self.captions, token % self.captions
        new = slice(start - self.patches, None)
        words = (caption[new, None] == caption) & (step[new, None] >= step)
        if self.read is None:
            return torch.cat([words.new_ones(len(words), self.patches), words], dim=1)
        samples = len(self.read)
        return torch.cat([self.read.expand(-1, -1, len(words), -1), words.expand(samples, 1, -1, -1)], dim=3)

    def follow(self, origins: Tensor, steps: int) -> None:
        for tensor in (self.keys, self.values):
            words = tensor[:, :, self.patches : self.length].unflatten(2, (steps, self.captions))
            index = origins[:, None, None, :, None].expand_as(words)
            tensor[:, :, self.patches : self.length] = words.gather(3, index).flatten(2, 3)


@contextmanager
def _remembering(blocks: Iterable[Any], caches: list[_Cache], kept: Sequence[list[Tensor]] = ()) -> Iterator[None]:
    """Inside, every block's attention goes through its cache, and its cross-attention keeps keys and values in its list
    of `kept`."""
    attentions, crossing = [block.attention for block in blocks], [block.cross_attention for block in blocks if kept]
    usual = [attention.attend for attention in attentions]
    try:
        for attention, cache in zip(attentions, caches, strict=True):
            attention.attend = cache
        for attention, own in zip(crossing, kept, strict=True):
            attention.kept = own
        yield
    finally:
        for attention, attend in zip(attentions, usual, strict=True):
            attention.attend = attend
        for attention in crossing:
            attention.kept = None
