"""Captions by beam search.

The score of a caption is sum(log p of its words, </s> included) / length^penalty, where the length counts <s> and </s>
(Wu et al. 2016, without the constant of their length term). At every step the best extensions of an image's open
captions are looked at, best first, until K go on; those before that end in </s> are finished. An image is done when no
open caption can overtake the best finished one any more. Lengths and the end of the search are those of unilm's BEiT-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor

from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.decoding import Questions, decoder_of


class Vocabulary(Protocol):
    """The ids that writing needs; `data.text.TextTokenizer` is one."""

    bos: int
    eos: int
    mask: int
    words: range
    """Ids that may be written besides </s>."""


@dataclass(frozen=True)
class _Search:
    """Numbers of a search, as in `generate`. They may come from a user of `inference.Model`."""

    beams: int
    length_penalty: float
    max_words: int

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)
        for name in ("beams", "max_words"):
            if not isinstance(given[name], Integral) or int(given[name]) < 1:
                raise ValueError(f"{name} must be a positive whole number, not {given[name]!r}")
        penalty = given["length_penalty"]
        if not isinstance(penalty, Real) or not 0 <= float(penalty) < math.inf:
            raise ValueError(f"length_penalty must be a number and not negative, not {penalty!r}")


@torch.no_grad()
def generate(
    model: BEiT3,
    images: Tensor,
    vocabulary: Vocabulary,
    *,
    beams: int = 3,
    length_penalty: float = 0.6,
    max_words: int = 31,
    at_mask: bool = True,
    agree: Callable[[bool], bool] = lambda done: done,
    questions: Questions | None = None,
) -> list[list[int]]:
    """The best caption found of each image [B, 3, S, S], or answer to each question, without <s> and </s>. An image's
    does not depend on which others are in the batch.

    `max_words` counts </s>; a caption that reaches it is cut there, and competes as it is. `at_mask`: whether the model
    was taught to tell a word at a <mask> in its place, or at the word before it, see `Decoder.step`; a model's own
    decoder tells it there alone. `agree`: called
    after every step with whether all images of this process are done; the search ends when it returns True. Under
    ZeRO-3 and tensor parallelism all ranks must end at the same step: let it be a reduction over the ranks.

    Raises ValueError for numbers that cannot be, RuntimeError where the model's logits are not finite.
    """
    search = _Search(beams, length_penalty, max_words)
    decoder = decoder_of(model, images, beams, max_words, questions)
    beam = _Beams(len(images), vocabulary, model.config.vocab_size, search, images.device)
    mask = vocabulary.mask if at_mask else None
    for _ in range(max_words):
        beam.extend(decoder.step(beam.last_words, mask), decoder.follow)
        if agree(bool(beam.done.all())):
            break
    return beam.best()


def padded(texts: list[list[int]], length: int, pad: int, device: torch.device) -> Tensor:
    """int64 [B, length]: texts of fewer tokens, filled up."""
    return torch.tensor([text + [pad] * (length - len(text)) for text in texts], device=device)


class _Beams:
    """K open captions and the best finished one of each of B images, as tensors."""

    def __init__(self, images: int, vocabulary: Vocabulary, rows: int, search: _Search, device: torch.device) -> None:
        self.search, self.eos = search, vocabulary.eos
        self.step = 0
        self.last_words = torch.full((images, search.beams), vocabulary.bos, device=device)
        """int64 [B, K]: what the next word follows."""
        self.words = torch.full((images, search.beams, search.max_words), self.eos, device=device)
        """int64 [B, K, max_words]: the open captions, </s> where nothing is written yet."""
        # All captions begin alike: only the first counts, or they would stay alike.
        self.sums = torch.full((images, search.beams), -torch.inf, device=device)
        self.sums[:, 0] = 0.0
        self.done = torch.zeros(images, dtype=torch.bool, device=device)
        self.best_score = torch.full((images,), -torch.inf, device=device)
        self.best_words = self.words[:, 0].clone()
        self.writable = torch.full((rows,), -torch.inf, device=device)
        """[V]: 0 for what may be written, else -inf."""
        self.writable[vocabulary.words.start : vocabulary.words.stop] = 0.0
        self.writable[self.eos] = 0.0

    def extend(self, logits: Tensor, follow: Callable[[Tensor], None]) -> None:
        """One more word, from logits [B, K, V]; `follow` learns which caption each open one goes on from."""
        self.step += 1
        candidates = self.sums[:, :, None] + (logits.float() + self.writable).log_softmax(-1)
        # Each caption has one candidate that ends, so among 2 K candidates there are K that go on.
        sums, index = candidates.flatten(1).topk(2 * self.search.beams)
        origins, words = index // logits.shape[2], index % logits.shape[2]
        ends = words == self.eos

        before_the_last_that_goes_on = (~ends).cumsum(1) < self.search.beams
        self._finish(sums, origins, ends & before_the_last_that_goes_on & torch.isfinite(sums))

        self.sums, chosen = sums.masked_fill(ends, -torch.inf).topk(self.search.beams)
        origins, words = origins.gather(1, chosen), words.gather(1, chosen)
        self.words = self.words.gather(1, origins[:, :, None].expand_as(self.words))
        self.words[:, :, self.step - 1] = self.last_words = words
        follow(origins)

        # Sums only fall, so no open caption can end with a better score than its sum over the greatest length gives.
        reachable = self.sums.amax(1) / (self.search.max_words + 1) ** self.search.length_penalty
        self.done |= self.best_score >= reachable

        if self.step == self.search.max_words:  # the cut ones
            here = torch.arange(self.search.beams, device=origins.device).expand_as(origins)
            self._finish(self.sums, here, torch.isfinite(self.sums))
            self.done.fill_(True)

    def _finish(self, sums: Tensor, origins: Tensor, complete: Tensor) -> None:
        """Keeps the best of the complete captions [B, n] where it beats the best so far, in images not yet done."""
        scores = sums.masked_fill(~complete, -torch.inf) / (self.step + 1) ** self.search.length_penalty
        score, place = scores.max(1)
        better = (score > self.best_score) & ~self.done
        origin = origins.gather(1, place[:, None])[:, :, None].expand(-1, -1, self.search.max_words)
        self.best_words = torch.where(better[:, None], self.words.gather(1, origin)[:, 0], self.best_words)
        self.best_score = torch.where(better, score, self.best_score)

    def best(self) -> list[list[int]]:
        if not bool(torch.isfinite(self.best_score).all()):
            raise RuntimeError("the model's logits of words are not finite: captions cannot be ranked")
        rows: list[list[int]] = self.best_words.tolist()
        return [row[: row.index(self.eos)] if self.eos in row else row for row in rows]
