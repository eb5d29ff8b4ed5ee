"""Zero-shot scores of a model while it is pretrained: retrieval, and classes by their names, by its own contrast.

They are what tools/evaluate.py says of its checkpoint, and have the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.data.faults import StreamFailed
from beit3_dist.data.text import TextTokenizer
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import normalized
from beit3_dist.objectives.contrastive import Contrastive
from beit3_dist.parallel.collectives import made_in_shares
from beit3_dist.parallel.engine import Engine
from beit3_dist.run.preemption import Together
from beit3_dist.tasks.data.augmentation import Views
from beit3_dist.tasks.data.batches import padded_words
from beit3_dist.tasks.data.zero_shot import Captioned, Classed, ZeroShotData, decoded_whole
from beit3_dist.tasks.parts.frozen import class_accuracies, named_as_published, names_as_vectors
from beit3_dist.tasks.parts.metrics import recall
from beit3_dist.tasks.retrieval import Retrieval

AT_ONCE = 64
"""Images or texts of a rank that the model sees at a time."""


class ZeroShot:
    """Scores of a pretraining run's model. Every method is collective."""

    def __init__(
        self, config: RunConfig, data: ZeroShotData, engine: Engine, tokenizer: TextTokenizer, together: Together
    ) -> None:
        self._data, self._engine, self._tokenizer, self._together = data, engine, tokenizer, together
        self._size, self._longest = config.model.image_size, config.model.max_text_length
        self._views = Views(evaluation=Retrieval.evaluation)

    def scores(self) -> dict[str, float]:
        """By the names of CLIP_benchmark's results; the same on all ranks."""
        found: dict[str, float] = {}
        if self._data.captioned is not None:
            found |= self._retrieval(self._data.captioned)
        if self._data.classed is not None:
            found |= self._classes(self._data.classed)
        return found

    def _retrieval(self, pairs: Captioned) -> dict[str, float]:
        owners = torch.tensor([image for image, texts in enumerate(pairs.captions) for _ in texts])
        texts = self._texts([text for some in pairs.captions for text in some])
        return named_as_published(recall(self._images(pairs.images, "eval.retrieval"), texts, owners))

    def _classes(self, classed: Classed) -> dict[str, float]:
        by_name = names_as_vectors(self._texts, classed.names, classed.templates)
        return class_accuracies(self._images(classed.images, "eval.classes") @ by_name.T, classed.labels)

    def _images(self, images: Sequence[Any], field: str) -> Tensor:
        """Unit vectors [N, E] on the host."""

        def seen(rows: Tensor) -> Tensor:
            try:
                views = [self._views.evaluate(decoded_whole(images[row], field), self._size) for row in rows.tolist()]
            except (ValueError, OSError) as error:
                raise StreamFailed(str(error)) from error
            return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)

        def vectors(rows: Tensor) -> Callable[[BEiT3], Tensor]:
            pixels = normalized(self._together(lambda: seen(rows)).to(self._engine.mesh.device))
            return lambda model: _head(model)(model.encode(pixels)[:, 0], None)[0]

        return self._embedded(vectors, len(images))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, E] on the host."""
        tokens = [self._tokenizer.encode_beginning(text) for text in texts]

        def vectors(rows: Tensor) -> Callable[[BEiT3], Tensor]:
            words, padding = padded_words([tokens[row] for row in rows.tolist()], self._longest)
            words = words.to(self._engine.mesh.device)
            return lambda model: _head(model)(None, model.encode(None, words, padding)[:, 0])[1]

        return self._embedded(vectors, len(texts))

    def _embedded(self, vectors: Callable[[Tensor], Callable[[BEiT3], Tensor]], count: int) -> Tensor:
        """What `vectors` of so many rows come to; every replica makes its share."""

        def make(rows: Tensor) -> Tensor:
            return torch.cat([self._engine.predict(vectors(some), bool) for some in rows.split(AT_ONCE)])

        return made_in_shares(make, count, self._engine.groups.data).cpu()


def _head(model: BEiT3) -> Any:
    return model.objective_heads[Contrastive.name]
