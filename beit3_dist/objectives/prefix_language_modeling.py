"""Prefix language modelling: the words of a text one by one, after its image and a beginning of it.

A caption's image and its first words, the prefix, see one another; each word after it sees the prefix and the words
between, and tells the next one (SimVLM, Wang et al. 2022). With the image alone as the prefix it is captioning, as CoCa
and BLIP learn it. The pairs are one more group of the pass, under a mask of their own.

Every word after the prefix is told, at the word before it, which has its true predecessors. UniLM's form, in which some
words are <mask> and told in their place, learns a share of them from contexts full of masks, which writing never has.
So what is learnt here is what `inference.Model.caption` asks of a model that was only pretrained.

Where the model has a decoder (model.decoder_layers; mPLUG, Li et al. 2022), the pass encodes an image and the prefix of
its caption alone, <s> at least, and the decoder, which looks at what became of both, writes the rest after <s>.

While a micro-batch has such a group, all of its attention takes the padded kernel, which alone has masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from beit3_dist.config import RunConfig, require
from beit3_dist.data.batch import MicroBatch, Samples
from beit3_dist.data.order import Stream
from beit3_dist.data.streams import Sample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.text_decoder import decoder_group, flops_of_reading, flops_per_word
from beit3_dist.model.token_layout import Group
from beit3_dist.objectives.base import Loss, Objective, Places, View
from beit3_dist.objectives.masked_data_modeling import WORD
from beit3_dist.objectives.momentum_distillation import MomentumDistillation
from beit3_dist.objectives.soft_targets import Taught, losses_of

NAME = "prefix_language_modeling"
SECTION = f"objectives.{NAME}"


@dataclass(kw_only=True)
class PrefixLanguageModelingConfig:
    """Prefix language modelling."""

    prefix: Literal["drawn", "image"] = "drawn"
    """drawn: the prefix is the image and a number of words, drawn per sample from none to all (SimVLM); </s> always
    comes after it. image: it is the image alone (captioning); texts then have none."""
    texts: bool = False
    """Whether the stream of texts is learnt too, which costs one more pass over them; not by a model with a decoder."""
    pair_weight: float = 1.0
    """Weight of the captions' loss (SimVLM and mPLUG: 1; CoCa has 2 beside contrast's 1)."""
    text_weight: float = 1.0
    """Weight of the texts' loss."""

    def __post_init__(self) -> None:
        for name in ("pair_weight", "text_weight"):
            require(getattr(self, name) >= 0, f"{SECTION}.{name}={getattr(self, name)} is negative")


@dataclass(frozen=True)
class Written:
    """What a decoder reads of a micro-batch."""

    read: Group
    """The pairs that were encoded: images and prefixes."""
    words: Tensor
    """int64 [M]: <s> and, but for the last, the words after each prefix."""
    positions: Tensor
    """int64 [M]: of these, from <s> on."""
    group: Group
    """Of `decoder_group`."""


@dataclass(frozen=True)
class Targets:
    """The words that follow those that are read, pairs' before texts'."""

    words: Tensor
    """int64 [M]."""
    counts: list[int]
    """How many of each loss."""
    written: Written | None = None
    """What a decoder reads; None: there is none."""
    taught: Taught | None = None
    """What a moving average of the model says of the words."""


class PrefixLanguageModeling(Objective):
    """One loss for each stream with text: cross-entropies of the words after the prefixes, </s> included."""

    name = NAME
    Config = PrefixLanguageModelingConfig

    def __init__(self, config: PrefixLanguageModelingConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        weights = {Stream.PAIRS: config.pair_weight}
        if config.texts:
            require(Stream.TEXTS in self.streams, f"{SECTION}.texts: the run has no texts, batch.texts=0")
            require(
                self.model.decoder_layers == 0,
                f"{SECTION}.texts: the decoder of model.decoder_layers={self.model.decoder_layers} looks at images, "
                "which texts lack: leave it off",
            )
            weights[Stream.TEXTS] = config.text_weight
        streams = [stream for stream in weights if stream in self.streams]
        ends = self.model.decoder_layers > 0
        self.views = [View(s.field, s.has_images, True, prefix_by=self.name, ends=ends) for s in streams]
        titles = {Stream.PAIRS: "next words of captions", Stream.TEXTS: "next words of texts"}
        self.losses = [
            Loss(f"{stream.field[:-1]}_next_word", weights[stream], title=titles[stream], unit="word",
                 stream=stream.field, classes=self.model.vocab_size, remedy=WORD)
            for stream in streams
        ]  # fmt: skip
        self.looks_back = MomentumDistillation.name in run.objectives and bool(self.losses)

    def meet(self, others: Mapping[str, Objective]) -> None:
        self._momentum: Any = others.get(MomentumDistillation.name)

    def annotate(
        self, stream: Stream, samples: Sequence[Sample], text: np.ndarray | None, tokenizer: TextTokenizer
    ) -> dict[str, Tensor]:
        """`prefix` int64 [n]: tokens of the text in the prefix; 0: none, or <s> and at least one word."""
        if stream.field not in {view.stream for view in self.views}:
            return {}
        words = np.zeros(len(samples), dtype=np.int64)
        if self.config.prefix == "drawn":
            # As many as there are words, and one case more: none of them.
            cases = np.array([max(1, len(sample.words) - 1) for sample in samples], dtype=np.int64)
            words = (self.numbers(samples, 0)(0, 1)[:, 0] * cases).astype(np.int64)
        return {"prefix": torch.from_numpy(np.where(words > 0, 1 + words, 0))}

    def _after(self, batch: MicroBatch) -> list[Tensor]:
        """bool [n, L] for each view: the words after the prefix."""
        return [_after(batch.streams[view.stream], self.name) for view in self.views]

    def counts(self, batch: MicroBatch) -> list[int]:
        return [int(own.sum()) for own in self.targets_by_sample(batch)]

    def targets_by_sample(self, batch: MicroBatch) -> list[Tensor]:
        return [after.sum(1) for after in self._after(batch)]

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        """The word before each of them; for a decoder, all that it looks at."""
        if self.model.decoder_layers:
            return torch.cat([places.all(view) for view in self.views])
        before = (after.roll(-1, dims=1) for after in self._after(batch))
        return torch.cat([places.words(view, mask) for view, mask in zip(self.views, before, strict=True)])

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> Targets:
        words = []
        for view, after in zip(self.views, self._after(batch), strict=True):
            text = batch.streams[view.stream].text
            assert text is not None
            words.append(text[after])
        told, counts = move(torch.cat(words)), [len(some) for some in words]
        written = self._written(batch, places, move) if self.model.decoder_layers else None
        return Targets(told, counts, written)

    def _written(self, batch: MicroBatch, places: Places, move: Callable[[Tensor], Tensor]) -> Written:
        (view,) = self.views
        samples, read = batch.streams[view.stream], places.group(view)
        assert samples.text is not None and samples.lengths is not None
        lengths, text = view.lengths(samples), samples.text
        after = samples.lengths - lengths
        place, shown = torch.arange(int(after.max())), torch.arange(read.patches + read.words)
        before = (lengths[:, None] + place - 1).clamp(max=text.shape[1] - 1)
        words = text.gather(1, before)
        words[:, 0] = text[:, 0]
        group = decoder_group(shown < read.patches + lengths[:, None], place >= after[:, None])
        here = words.flatten() if group.index is None else words.flatten()[group.index]
        return Written(read.moved(move), move(here), move(group.positions(torch.device("cpu"))), group.moved(move))

    def _telling(self, model: BEiT3, hidden_MD: Tensor, written: Written | None) -> Tensor:
        """[M, D]: what the head tells each word from."""
        if written is None:
            return model.text_norm(hidden_MD)
        read = written.read
        patches, words = hidden_MD.split([read.samples * read.patches, read.real_words])
        memory = read.by_sample(torch.cat([model.image_norm(patches), model.text_norm(words)]))
        return model.decoder(memory, written.words, written.positions, written.group)

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Targets) -> Tensor:
        head = partial(model.text_head, self._telling(model, hidden_MD, targets.written))
        losses_2M = losses_of(head, targets.words, targets.taught if model.training else None)
        of_targets = losses_2M.split(targets.counts, dim=1)
        self.each = [some.detach() for some in of_targets]
        return torch.stack([some.sum(1) for some in of_targets], dim=1)

    def look(self, model: BEiT3, hidden_MD: Tensor, targets: Targets) -> Tensor:
        return model.text_head(self._telling(model, hidden_MD, targets.written))

    def looked(self, found: list[Tensor], step: int) -> list[Taught]:
        return self._momentum.taught(found, step)

    def with_looked(self, targets: Targets, own: Taught) -> Targets:
        return replace(targets, taught=own)

    def classes(self, targets: Targets) -> list[Tensor]:
        return list(targets.words.split(targets.counts))

    def head_flops(self, counts: Sequence[float]) -> float:
        return sum(self.head_products(counts).values())

    def head_products(self, counts: Sequence[float]) -> dict[str, float]:
        told, words = sum(counts), flops_per_word(self.model)
        products = {"text_head.": 2 * self.model.width * self.model.vocab_size * told}
        return products | ({"decoder.": words * told} if words else {})

    def sample_flops(self, batch: MicroBatch) -> float:
        """Of the decoder: keys and values of what it looks at, and its attention."""
        if not self.model.decoder_layers:
            return 0
        (view,) = self.views
        samples = batch.streams[view.stream]
        assert samples.lengths is not None
        lengths = view.lengths(samples)
        return flops_of_reading(self.model, 1 + self.model.patches + lengths, samples.lengths - lengths)

    def expected_counts(self, samples: dict[str, int], run: RunConfig) -> list[float]:
        lengths = {"pairs": run.data.caption_length, "texts": run.data.text_length}
        share = 0.5 if self.config.prefix == "drawn" else 1.0
        return [share * samples[view.stream] * lengths[view.stream] for view in self.views]


def _after(samples: Samples, objective: str) -> Tensor:
    """bool [n, L]: the words after the prefix, which <s> never is."""
    assert samples.text is not None and samples.lengths is not None
    place, prefix = torch.arange(samples.text.shape[1]), samples.annotations[objective]["prefix"]
    return (place >= prefix.clamp(min=1)[:, None]) & (place < samples.lengths[:, None])
