"""Images for texts and texts for images, by vectors that lie close where they belong together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.objectives.contrast import Contrast, ContrastHead, Kept, Vectors, contrast_step, softmax_contrast
from beit3_dist.tasks.base import Task, TaskInputs
from beit3_dist.tasks.data.examples import Example, Record, Rules, integer
from beit3_dist.tasks.parts.heads import FineTuned, TaskHead
from beit3_dist.tasks.parts.metrics import ROWS_AT_ONCE, More, first_rows, recall
from beit3_dist.tasks.registry import register

BEST = 10


class Contrastive(Task):
    """What the tasks share that compare vectors of images and of texts."""

    contrastive = True
    serves: ClassVar[tuple[str, ...]] = ("embed_images", "embed_texts")

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return ContrastiveHead(config.width)

    @classmethod
    def pretrained_head(cls, config: ModelConfig, weights: Mapping[str, Tensor]) -> TaskHead:
        return ContrastiveHead(config.width, len(weights["vision_head.weight"]))

    @property
    def contrast(self) -> Contrast:
        """How vectors are compared."""
        return softmax_contrast

    def embeddings(self, model: FineTuned, inputs: TaskInputs) -> Vectors:
        """Vectors of images and of texts, each encoded by itself."""
        keep = inputs.keep(inputs.keys), inputs.keep(~inputs.keys)  # either side draws for itself
        cls = model.encode(inputs.images[:, 0], keep=keep[0])[:, 0]
        start = model.encode(None, inputs.words, inputs.padding, keep=keep[1])[:, 0]
        images, texts, scale, _ = model.task_head(cls, start)
        return Vectors(images, texts, scale)

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Mean of the two cross-entropies of telling an example's text from all texts and its image from all."""
        return self.contrasted(self.look(model, inputs), inputs)

    def contrasted(self, found: Vectors, inputs: TaskInputs) -> Tensor:
        """The losses of the micro-batch's vectors, or their sums as a part of the step's."""
        if inputs.looked is not None:
            return inputs.looked.sums_of(found)[:, None]
        return self.contrast(found, self.replicas)

    def look(self, model: FineTuned, inputs: TaskInputs) -> Vectors:
        return self.embeddings(model, inputs)

    def looked(self, found: list[Vectors]) -> list[Kept]:
        return contrast_step(self.contrast, found, self.replicas)

    def embed_images(self, model: FineTuned, images: Tensor) -> Tensor:
        """Unit vectors [B, D] of images [B, 3, S, S]."""
        return model.task_head(model.encode(images)[:, 0], None)[0]

    def embed_texts(self, model: FineTuned, words: Tensor, padding: Tensor) -> Tensor:
        """Unit vectors [B, D] of texts: words int64 and padding bool, [B, L]."""
        return model.task_head(None, model.encode(None, words, padding)[:, 0])[1]


@register("retrieval")
class Retrieval(Contrastive):
    """Image-text contrast over the examples of all ranks. Labels: number of the image, int64 [B]."""

    reads_text = True
    pretrained_by = "contrastive"

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        image = integer(record, "image_id")
        return Example(number, rules.paths(record, "image_path"), rules.words(record), image, str(image))

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """float [B, 2, D]: vectors of the image and of the text."""
        found = self.embeddings(model, inputs)
        return torch.stack([found.images, found.texts], dim=1)

    def score(self, predictions: Any, examples: Sequence[Example]) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways, each image counted once however many texts it has, and their mean."""
        return mean_recalls(predictions, examples)

    def write_predictions(self, folder: Path, predictions: Any, examples: Sequence[Example]) -> None:
        write_retrieval(folder, [e.name for e in examples], predictions[:, 0], predictions[:, 1])


def images_and_owners(examples: Sequence[Example]) -> tuple[list[int], Tensor]:
    """The row of each image's first example, and int64 [N]: by its place among them, the image of each text."""
    of_text = [int(example.label) for example in examples]
    first = first_rows(of_text)
    numbers = {image: number for number, image in enumerate(first)}
    return list(first.values()), torch.tensor([numbers[image] for image in of_text])


def mean_recalls(predictions: Tensor, examples: Sequence[Example], more: More | None = None) -> dict[str, float]:
    """`recall` by vectors [N, 2, D] of images and texts, with `more` added to their scores, and its mean."""
    rows, of_text = images_and_owners(examples)
    scores = recall(predictions[rows, 0], predictions[:, 1], of_text, more=more)
    return scores | {"mean_recall": sum(scores.values()) / len(scores)}


def match_logits(
    model: FineTuned, head: Callable[[Tensor], Tensor], images: Tensor, words: Tensor, padding: Tensor
) -> Tensor:
    """[B]: what matching's head says of images [B, 3, S, S] and words [B, L], for a match less than against one."""
    no, yes = head(model.encode(images, words, padding)[:, 1 + model.config.patches]).unbind(1)
    return yes - no


class ContrastiveHead(ContrastHead, TaskHead):
    """The contrast's head as a task's."""


def write_retrieval(
    folder: Path, image_of_text: Sequence[str], images: Tensor, texts: Tensor, more: More | None = None
) -> Path:
    """retrieval.jsonl: the ten best images of each text, and the ten best texts of each image, with their scores. Row i
    is text i, vectors [N, D], and the image that it belongs to; an image that comes several times is taken from its
    first row. A text is called by its row, an image by its name. `more` is added to the scores, as by `recall`."""
    first = first_rows(image_of_text)
    names, images = list(first), images[list(first.values())]
    of_texts, of_images = more or (None, None)
    path = folder / "retrieval.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for row, (places, scores) in enumerate(_best(texts, images, of_texts)):
            record: dict[str, Any] = {"text": row, "images": [names[place] for place in places], "scores": scores}
            file.write(json.dumps(record) + "\n")
        for name, (places, scores) in zip(names, _best(images, texts, of_images), strict=True):
            file.write(json.dumps({"image": name, "texts": places, "scores": scores}) + "\n")
    return path


def _best(queries: Tensor, candidates: Tensor, more: Tensor | None) -> Iterable[tuple[list[int], list[float]]]:
    for rows in torch.arange(len(queries)).split(ROWS_AT_ONCE):
        similar = queries[rows] @ candidates.T
        best = (similar if more is None else similar + more[rows]).topk(min(BEST, len(candidates)))
        for places, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            yield places, [round(score, 5) for score in scores]
