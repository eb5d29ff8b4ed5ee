"""Scores of a model as it is while it is pretrained: retrieval and classes by its contrast, captions by prefix, and
classes by its features.

They are what tools/evaluate.py says of its checkpoint, by the same `tasks.parts.scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.data.faults import StreamFailed
from beit3_dist.data.text import TextTokenizer
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import normalized
from beit3_dist.objectives.contrastive import Contrastive
from beit3_dist.parallel.collectives import all_agree, made_in_shares
from beit3_dist.parallel.engine import Engine
from beit3_dist.run.preemption import Together
from beit3_dist.tasks.captioning import Captioning
from beit3_dist.tasks.data.augmentation import Views
from beit3_dist.tasks.data.batches import padded_words
from beit3_dist.tasks.data.zero_shot import Classed, ZeroShotData, decoded_whole
from beit3_dist.tasks.imagenet import ImageNet
from beit3_dist.tasks.parts import scores
from beit3_dist.tasks.parts.frozen import frozen_features
from beit3_dist.tasks.parts.generation import generate, padded
from beit3_dist.tasks.retrieval import Retrieval

AT_ONCE = 64
"""Images or texts of a rank that the model sees at a time."""

Seen = Callable[[BEiT3], Tensor]


class ZeroShot:
    """Scores of a pretraining run's model. Every method is collective."""

    def __init__(
        self, config: RunConfig, data: ZeroShotData, engine: Engine, tokenizer: TextTokenizer, together: Together
    ) -> None:
        self._data, self._engine, self._tokenizer, self._together = data, engine, tokenizer, together
        self._size, self._longest = config.model.image_size, config.model.max_text_length
        self._by_names = Contrastive.name in config.objectives

    def scores(self) -> dict[str, float]:
        """By the names of CLIP_benchmark's results; the same on all ranks."""
        data, found = self._data, dict[str, float]()
        if data.retrieval is not None:
            found |= scores.retrieval_scores(data.retrieval, partial(self._vectors, "eval.retrieval"), self._texts)
        if data.captions is not None:
            found |= scores.caption_matches(data.captions, self._captions, ("exact_match",))
        if data.classed is not None and self._by_names:
            found |= scores.name_scores(data.classed, partial(self._vectors, "eval.classes"), self._texts)
        if data.classed is not None and data.classed.train is not None:
            found |= self._frozen(data.classed, *data.classed.train)
        return found

    def _frozen(self, classed: Classed, images: list[Any], known: Tensor) -> dict[str, float]:
        """On the device: a probe of many classes takes long without one."""
        train, test = self._features("eval.classes_train", images), self._features("eval.classes", classed.images)
        given = train, known.to(train.device), test, classed.labels.to(train.device), len(classed.names)
        return scores.neighbour_scores(*given) | scores.linear_scores(*given)[0]

    def _vectors(self, field: str, images: Sequence[Any]) -> Tensor:
        """Unit vectors [N, E] on the host."""
        by_contrast: Callable[[BEiT3, Tensor], Tensor] = lambda model, pixels: _head(model)(  # noqa: E731
            model.encode(pixels)[:, 0], None
        )[0]
        return self._of_images(field, Retrieval.evaluation, images, by_contrast).cpu()

    def _features(self, field: str, images: Sequence[Any]) -> Tensor:
        """Of the frozen encoder, fp32 [N, D]."""
        encoded: Callable[[BEiT3, Tensor], Tensor] = lambda model, pixels: frozen_features(  # noqa: E731
            model.encode(pixels)
        )
        return self._of_images(field, ImageNet.evaluation, images, encoded).float()

    def _captions(self, images: Sequence[Any]) -> list[str]:
        """Of each image what the model says of it, with the search's settings of `inference.Model.caption`."""
        agree, longest = (
            partial(all_agree, device=self._engine.mesh.device),
            Captioning.usual_text_length or self._longest,
        )
        words = min(longest, self._longest) - 1

        def written(model: BEiT3, pixels: Tensor) -> Tensor:
            captions = generate(model, pixels, self._tokenizer, max_words=words, at_mask=False, agree=agree)
            return padded(captions, 1 + words, self._tokenizer.pad, pixels.device)

        found = self._of_images("eval.captions", Captioning.evaluation, images, written)
        return [self._tokenizer.decode(text) for text in found.tolist()]

    def _of_images(
        self, field: str, evaluation: Any, images: Sequence[Any], make: Callable[[BEiT3, Tensor], Tensor]
    ) -> Tensor:
        """What `make` makes of the model and the images' pixels [B, 3, S, S]: [N, ...]."""
        views = Views(evaluation=evaluation)

        def seen(rows: Tensor) -> Tensor:
            try:
                return views.seen((decoded_whole(images[row], field) for row in rows.tolist()), self._size)
            except (ValueError, OSError) as error:
                raise StreamFailed(str(error)) from error

        def made(rows: Tensor) -> Seen:
            pixels = normalized(self._together(lambda: seen(rows)).to(self._engine.mesh.device))
            return lambda model: make(model, pixels)

        return self._made(made, len(images))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, E] on the host."""
        tokens = [self._tokenizer.encode_beginning(text) for text in texts]

        def vectors(rows: Tensor) -> Seen:
            words, padding = padded_words([tokens[row] for row in rows.tolist()], self._longest)
            words = words.to(self._engine.mesh.device)
            return lambda model: _head(model)(None, model.encode(None, words, padding)[:, 0])[1]

        return self._made(vectors, len(texts)).cpu()

    def _made(self, made: Callable[[Tensor], Seen], count: int) -> Tensor:
        """What `made` of so many rows comes to; every replica makes its share."""

        def make(rows: Tensor) -> Tensor:
            return torch.cat([self._engine.predict(made(some), bool) for some in rows.split(AT_ONCE)])

        return made_in_shares(make, count, self._engine.groups.data)


def _head(model: BEiT3) -> Any:
    return model.objective_heads[Contrastive.name]
