"""Classes of images from the mean of the patches, as in ImageNet-1k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.data.kinds import is_jsonl
from beit3_dist.tasks.base import Task, TaskInputs, cross_entropies
from beit3_dist.tasks.data.augmentation import IMAGENET
from beit3_dist.tasks.data.class_shards import read_class_shards
from beit3_dist.tasks.data.examples import Example, Record, Rules, integer
from beit3_dist.tasks.parts.heads import ClassHead, FineTuned, TaskHead
from beit3_dist.tasks.parts.metrics import top_k
from beit3_dist.tasks.parts.submissions import write_classes
from beit3_dist.tasks.registry import register


@register("imagenet")
class ImageNet(Task):
    """Labels: classes int64 [B], or probabilities [B, classes] where Mixup or CutMix mixed the images."""

    metric = "top1"
    statistics = IMAGENET
    evaluation = "centre"
    needs_names = has_classifier = mixes = True
    serves: ClassVar[tuple[str, ...]] = ("classify",)

    def examples(self, train: bool) -> Sequence[Example]:
        """From indexes, or from tars with a .cls member for each image."""
        if all(map(is_jsonl, self.config.data.files(train))):
            return super().examples(train)
        pattern, field = self.config.data.pattern(train)
        return read_class_shards(pattern, field, self.config.data.cache, len(self.classes))

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        (path,) = rules.paths(record, "image_path")
        return Example(number, (path,), None, integer(record, "label", rules.classes), path.name)

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return ClassHead(config.width, classes)

    def logits(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """[B, classes]."""
        return model.task_head(model.encode(inputs.images[:, 0], keep=inputs.keep(inputs.keys)))

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        smoothing = self.config.label_smoothing if inputs.labels.ndim == 1 else 0.0  # mixing smooths by itself
        return cross_entropies(self.logits(model, inputs), inputs.labels, smoothing)

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B, 5]: the best classes, best first."""
        logits = self.logits(model, inputs)
        return logits.topk(min(5, logits.shape[1])).indices

    def results(self, predictions: Tensor) -> list[str]:
        """The best class of each image."""
        return [self.classes[best] for best in predictions[:, 0].tolist()]

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        return top_k(predictions, [example.label for example in examples])

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_classes(folder, [e.name for e in examples], predictions[:, 0].tolist())
