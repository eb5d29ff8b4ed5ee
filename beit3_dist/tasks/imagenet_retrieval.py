"""Classes of images by their names, as in the paper: an image's class is the name with the closest vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from beit3_dist.data.text import TextTokenizer
from beit3_dist.objectives.contrast import Contrast, Vectors, softmax_contrast
from beit3_dist.tasks.base import HALF, TaskInputs
from beit3_dist.tasks.data.batches import padded_words
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.imagenet import ImageNet
from beit3_dist.tasks.parts.heads import FineTuned
from beit3_dist.tasks.registry import register
from beit3_dist.tasks.retrieval import Contrastive

NAMES_AT_ONCE = 256


class NamedImages(Sequence[Example]):
    """Examples with a class, whose text is the name of the class."""

    def __init__(self, examples: Sequence[Example], names: Sequence[tuple[int, ...]]) -> None:
        """`names`: each class's name as token ids."""
        self.examples, self.names = examples, names

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: Any) -> Any:
        example = self.examples[place]
        return replace(example, words=self.names[example.label])


def names_as_words(names: Sequence[str], tokenizer: TextTokenizer) -> list[tuple[int, ...]]:
    """The names as token ids. Raises ValueError where two are the same, or one is empty: no text tells these apart."""
    words = [tuple(tokenizer.encode(name)) for name in names]
    first: dict[tuple[int, ...], int] = {}
    for number, name in enumerate(words):
        if not name:
            raise ValueError(f"data.answers: class {number} has no name; give each a line of words")
        if first.setdefault(name, number) != number:
            raise ValueError(
                f"data.answers: classes {first[name]} and {number} are both called {names[number]!r}; add a word to one"
            )
    return words


@register("imagenet_retrieval")
class ImageNetRetrieval(Contrastive, ImageNet):
    """Image-text contrast over the examples of all ranks; an image's text is the name of its class. Labels: classes
    int64 [B]."""

    statistics = HALF  # both sides as in pretraining, and as in the contrastive step before
    has_classifier = mixes = False
    _names: Tensor | None = None

    @property
    def contrast(self) -> Contrast:
        return partial(softmax_contrast, smoothing=self.config.name_smoothing)

    def examples(self, train: bool) -> Sequence[Example]:
        """In training with the names of their classes."""
        names = names_as_words(self.classes, self.tokenizer)
        return NamedImages(super().examples(train), names) if train else super().examples(train)

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        self._names = None  # the weights are about to change
        return super().losses(model, inputs)

    def look(self, model: FineTuned, inputs: TaskInputs) -> Vectors:
        """With the classes. All examples of one are right for each other, with equal shares: a batch holds some classes
        many times over, and the paper does not say what becomes of them."""
        return replace(self.embeddings(model, inputs), labels=inputs.labels[:, None])

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B, 5]: the classes with the closest names, closest first."""
        cosines = self._cosines(model, inputs)
        return cosines.topk(min(5, cosines.shape[1])).indices

    def logits(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """[B, classes]: the cosines with the names, by the temperature that was learnt."""
        return model.task_head(None, None)[2] * self._cosines(model, inputs)

    def _cosines(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """[B, classes], of the images with the names."""
        images = self.embed_images(model, inputs.images[:, 0]).float()
        if self._names is None:
            self._names = self._embedded_names(model, images.device)
        return images @ self._names.T

    def _embedded_names(self, model: FineTuned, device: torch.device) -> Tensor:
        words, padding = padded_words(names_as_words(self.classes, self.tokenizer), self.config.data.text_length)
        split = zip(words.split(NAMES_AT_ONCE), padding.split(NAMES_AT_ONCE), strict=True)
        parts = [self.embed_texts(model, some.to(device), padded) for some, padded in split]
        return torch.cat(parts).float()
