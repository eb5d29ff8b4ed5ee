"""Objects in images: what the tasks share that find them, with or without masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from beit3_dist.config import ModelConfig, require
from beit3_dist.data.text import TextTokenizer
from beit3_dist.tasks.base import Task, TaskInputs
from beit3_dist.tasks.config import DenseConfig, FinetuneConfig
from beit3_dist.tasks.data.batches import decoded
from beit3_dist.tasks.data.examples import Example, Record, Rules
from beit3_dist.tasks.data.marked import category_ids
from beit3_dist.tasks.data.object_views import Objects, ObjectViews, objects_of
from beit3_dist.tasks.data.objects import mask_tools, read_marked
from beit3_dist.tasks.parts.average_precision import (
    Detections,
    average_precision,
    packed,
    truth_of,
    unpacked_detections,
    write_detections,
)
from beit3_dist.tasks.parts.detector import Choice, Detector, Look
from beit3_dist.tasks.parts.drawing import with_objects
from beit3_dist.tasks.parts.heads import FineTuned, TaskHead
from beit3_dist.tasks.parts.upernet import resized_to

REGION_LOSSES, MASK_LOSS = ("class", "box"), "mask"


class Detection(Task):
    """Labels: `Objects` of the views. Predictions: `packed` detections in the views' pixels."""

    needs_names = keeps_names = True
    is_dense = True
    one_prediction = "image_id"
    serves: ClassVar[tuple[str, ...]] = ("detect",)
    draws_masks: ClassVar[bool] = False

    def __init__(self, config: FinetuneConfig, tokenizer: TextTokenizer | None, classes: Sequence[str] = ()) -> None:
        super().__init__(config, tokenizer, classes)
        self._to_show: list[tuple[Example, Detections]] = []

    @classmethod
    def read(cls, number: int, record: Record, rules: Rules) -> Example:
        return read_marked(number, record, rules, cls.draws_masks)

    def examples(self, train: bool) -> Sequence[Example]:
        mask_tools()  # a run that cannot be judged should not start
        return super().examples(train)

    @staticmethod
    def labels(examples: Sequence[Example], classes: int) -> Objects:
        return objects_of(examples)

    def views(self) -> ObjectViews:
        data = self.config.data
        require(
            not data.rand_augment and not data.random_erasing,
            f"data.rand_augment={data.rand_augment!r} and data.random_erasing={data.random_erasing} move or hide what "
            f"boxes are of: task={self.name} takes data.scales and data.horizontal_flip alone",
        )
        least, greatest = data.scales
        return ObjectViews(horizontal_flip=data.horizontal_flip, scales=(least, greatest), masks=self.draws_masks)

    @classmethod
    def head(cls, config: ModelConfig, classes: int, dense: DenseConfig | None = None) -> TaskHead:
        return Detector(config, classes, dense or DenseConfig(), cls.draws_masks)

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Means over the regions, or masks, of the micro-batch on all ranks; of the proposals' over its images."""
        head, images = _detector(model), inputs.images[:, 0]
        maps = head.pyramid.maps(model, images, inputs.keep(inputs.keys))
        objects, side = inputs.labels, images.shape[-1]
        losses, sums = head.losses(maps, objects, side, inputs.keys)
        counts = torch.stack([torch.ones_like(sums.regions), sums.regions, sums.objects]).sum(1)
        images, regions, masks = self.replicas.gather_constant(counts[None]).sum(0).clamp(min=1)
        total = sum(losses.values(), torch.zeros_like(sums.regions))
        for name, of_images in sums.losses.items():
            total = total + of_images * images / (masks if name == MASK_LOSS else regions)
        return torch.stack([total, sums.right / sums.regions.clamp(min=1)])

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Of the views at all of eval.scales and, with eval.flip, mirrored too."""
        head, settings, view = _detector(model), self.config.eval, inputs.images[:, 0]
        looks = []
        for scale in settings.scales:
            side = max(1, round(view.shape[-1] * scale))
            scaled = view if side == view.shape[-1] else resized_to(view, (side, side))
            for mirrored in (False, True)[: 1 + settings.flip]:
                maps = head.pyramid.maps(model, scaled.flip(-1) if mirrored else scaled)
                looks.append(Look(maps, side, mirrored))
        choice = Choice(settings.detections, settings.least_score, settings.soft_nms)
        return packed(*head.detect(looks, view.shape[-1], choice), settings.detections)

    def found(self, prediction: Tensor, size: tuple[int, int]) -> Detections:
        """Of one image of this width and height."""
        side = self.config.model.image_size
        return unpacked_detections(prediction, size, side, self.draws_masks, self.config.eval.maskness)

    def _all(self, predictions: Tensor, examples: Sequence[Example]) -> list[Detections]:
        sizes = [(example.label.width, example.label.height) for example in examples]
        return [self.found(row, size) for row, size in zip(predictions, sizes, strict=True)]

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        first = [examples[place] for place in range(min(self.config.eval.pictures, len(examples)))]
        self._to_show = list(zip(first, self._all(predictions[: len(first)], first), strict=True))
        told = [row for row, example in enumerate(examples) if example.label.objects is not None]
        if not told:
            return {}
        some = [examples[row] for row in told]
        found, truths = self._all(predictions[told], some), [example.label for example in some]
        settings = len(self.classes), self.config.eval.detections
        scores = average_precision(truths, found, *settings, masks=False)
        return scores | (average_precision(truths, found, *settings, masks=True) if self.draws_masks else {})

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        """boxes.json, and masks.json of masks, in COCO's format."""
        categories = category_ids(Path(self.config.data.answers)) or range(1, len(self.classes) + 1)
        images = [int(example.name) for example in examples]
        write_detections(folder, self._all(predictions, examples), images, categories, self.draws_masks)

    def shown(self) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        """The first images of the validation with what was found in them, seen beside what is there."""
        pictures = {}
        for place, (example, found) in enumerate(self._to_show):
            image = decoded(example.images[0], self.config.data.max_pixels)
            both = [with_objects(image, one, self.classes) for one in (truth_of(example.label), found)]
            pixels = np.concatenate([np.asarray(picture) for picture in both], axis=1)
            pictures[f"pictures/{place}"] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        return pictures, {}


def _detector(model: FineTuned) -> Detector:
    head = model.task_head
    assert isinstance(head, Detector)
    return head
