"""What trackers show of a validation: images with the model's guesses of hidden patches, captions with those of hidden
words, and which codes are taken for which.

The samples are fixed ones of the held-out streams, which every process reads alike. Codes look like the mean of the
held-out patches that carry them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from beit3_dist.config import STREAMS, BatchConfig, RunConfig
from beit3_dist.data.batch import MicroBatch, MixedBatches, Request
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages, Tokenize
from beit3_dist.image_tokenizer.drawing import mean_patches, patches_of, sheet
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import tokenizer_view_size
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.parallel.engine import Engine
from beit3_dist.run.preemption import Together
from beit3_dist.train.guesses import Example, guess, in_brackets, tiles

FOR_LOOKS = 256
"""Samples of each stream that the looks of the codes come from."""
AT_ONCE = 32
CONFUSED = 24
"""Codes of the confusion's rows, those that are hidden most often, and of its columns, those that are guessed."""


Shown = tuple[dict[str, Tensor], dict[str, str]]
"""Images, uint8 [3, H, W], and texts by name, for trackers."""


class Pictures:
    """Those of a pretraining run. Every method is collective."""

    def __init__(self, config: RunConfig, tokenizer: VQKD, tokenize: Tokenize, engine: Engine) -> None:
        self._config, self._tokenize, self._engine = config, tokenize, engine
        section = config.objectives.get(MaskedDataModeling.name) or MaskedDataModeling.Config()
        # One of its own: that of the training knows the others that it trains beside.
        alone = replace(config, objectives={MaskedDataModeling.name: section})
        self._masked = MaskedDataModeling(section, alone)
        self._alone, self._view = alone, tokenizer_view_size(tokenizer, config.image_tokenizer, config.model)
        self._codebook = tokenizer.quantize.embedding.weight.detach().cpu()
        self._looks: Tensor | None = None

    def shown(self, together: Together) -> Shown:
        """Of the model as it is; empty on all processes but the first."""
        batches = self._batches(1)
        images, _, pairs = batches.lengths()
        number = min(self._config.eval.pictures, *(length for length in (images, pairs) if length))
        examples: dict[str, list[Example]] = defaultdict(list)
        for i in range(number):
            request = Request((i * images // number, 0, i * pairs // number), 0)
            batch = together(partial(batches.__getitem__, request))
            guesses = partial(self._guess, batch=batch, codes=self._codes(batch), words_of=batches.tokenizer)
            for name, example in self._engine.predict(guesses, bool).items():
                examples[name].append(example)
        if self._looks is None:
            self._looks = self._looks_of_codes(together)
        return drawn(examples, self._looks) if self._engine.mesh.is_first else ({}, {})

    def _guess(self, model: BEiT3, batch: MicroBatch, codes: Tensor, words_of: TextTokenizer) -> dict[str, Example]:
        return guess(model, self._masked, batch, codes, self._alone, words_of)

    def _batches(self, at_once: int) -> MixedBatches:
        batch = BatchConfig(**{name: at_once * bool(getattr(self._config.batch, name)) for name in STREAMS})
        annotators: list[Any] = [self._masked]
        return MixedBatches(replace(self._alone, batch=batch), self._view, 0, 1, True, annotators)

    def _codes(self, batch: MicroBatch) -> Tensor:
        """int64 [I, patches] on the device."""
        return self._tokenize(SeenImages(batch, self._engine.mesh.device).tokenizer)

    def _looks_of_codes(self, together: Together) -> Tensor:
        """uint8 [codes, 3, p, p]."""
        model, batches = self._config.model, self._batches(AT_ONCE)
        sums = torch.zeros(model.visual_vocab_size, 3 * model.patch_size**2, dtype=torch.float64)
        carriers = torch.zeros(model.visual_vocab_size, dtype=torch.int64)
        for first in range(0, FOR_LOOKS, AT_ONCE):
            batch = together(partial(batches.__getitem__, Request((first, first, first), 0)))
            codes = self._codes(batch).cpu().flatten()
            pixels = patches_of(SeenImages(batch, torch.device("cpu")).model, model.patch_size).flatten(1).double()
            sums.index_add_(0, codes, pixels)
            carriers += torch.bincount(codes, minlength=len(carriers))
        return mean_patches(sums, carriers, self._codebook).unflatten(1, (3, model.patch_size, model.patch_size))


def drawn(examples: Mapping[str, list[Example]], looks: Tensor) -> Shown:
    """Sheets of examples, one below the other: original, input, guessed, from the true codes; captions; confusion."""
    images, texts = {}, {}
    for name, some in examples.items():
        columns = [torch.from_numpy(tile).permute(2, 0, 1) for one in some for tile in tiles(one, looks)]
        rows = torch.stack(columns).unflatten(0, (len(some), -1)).unbind(1)  # each [examples, 3, S, S]
        images[f"pictures/{name}"] = sheet([*rows])
        if any(one.caption for one in some):
            texts[f"captions/{name}"] = "\n".join(in_brackets(one.caption) for one in some)
    images["pictures/confusion"] = confusion([one for some in examples.values() for one in some], looks)
    return images, texts


def confusion(examples: list[Example], looks: Tensor) -> Tensor:
    """What the codes that are hidden most often are taken for: in the first column a patch of each true code, in the
    first row of each that is guessed most often, and between them the darker, the larger its share of the guesses.
    uint8 [3, H, W]."""
    true = torch.cat([one.codes[one.hidden] for one in examples])
    guessed = torch.cat([one.guesses[one.hidden] for one in examples])
    rows, columns = _most_frequent(true, len(looks)), _most_frequent(guessed, len(looks))
    hits = (true[:, None, None] == rows[:, None]) & (guessed[:, None, None] == columns)  # [M, rows, columns]
    shares = hits.sum(0) / (true[:, None] == rows).sum(0)[:, None]
    side = looks.shape[-1]
    levels = (255 * (1 - shares)).round().byte()[..., None, None, None].expand(-1, -1, 3, side, side)
    corner = torch.full((1, 3, side, side), 255, dtype=torch.uint8)
    lines = [torch.cat([looks[code, None], row]) for code, row in zip(rows, levels, strict=True)]
    return sheet([torch.cat([corner, looks[columns]]), *lines])


def _most_frequent(codes: Tensor, number: int) -> Tensor:
    counts = torch.bincount(codes, minlength=number)
    return counts.argsort(descending=True, stable=True)[: min(CONFUSED, int((counts > 0).sum()))]
