"""Classes of pictures from the mean of the patches, as in ImageNet-1k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from beit3_dist.tasks.augmentation import IMAGENET
from beit3_dist.tasks.examples import Example
from beit3_dist.tasks.heads import FineTuned
from beit3_dist.tasks.metrics import top_k
from beit3_dist.tasks.submissions import write_classes
from beit3_dist.tasks.task import Task, TaskInputs, cross_entropies


class ImageNet(Task):
    """Labels: classes int64 [B], or probabilities [B, classes] where Mixup or CutMix mixed the pictures."""

    statistics = IMAGENET
    metric = "top1"

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        logits = model.class_logits(inputs.images[:, 0], inputs.keep(inputs.keys))
        smoothing = self.config.label_smoothing if inputs.labels.ndim == 1 else 0.0  # mixing smooths by itself
        return cross_entropies(logits, inputs.labels, smoothing)

    def predict(self, model: FineTuned, inputs: TaskInputs, agree: Callable[[bool], bool]) -> Tensor:
        """int64 [B, 5]: the best classes, best first."""
        logits = model.class_logits(inputs.images[:, 0])
        return logits.topk(min(5, logits.shape[1])).indices

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        return top_k(predictions, [example.label for example in examples])

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_classes(folder, [e.name for e in examples], predictions[:, 0].tolist())
