"""Examples that belong to one class each: what tasks share that tell classes apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from beit3_dist.tasks.base import Task, TaskInputs, cross_entropies
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.parts.heads import FineTuned
from beit3_dist.tasks.parts.metrics import top_k
from beit3_dist.tasks.parts.submissions import write_classes


class Classification(Task):
    """Labels: classes int64 [B], or probabilities [B, classes] where Mixup or CutMix mixed the images."""

    needs_names = has_classifier = True
    serves: ClassVar[tuple[str, ...]] = ("classify",)
    ranked: ClassVar[int] = 1

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        smoothing = self.config.label_smoothing if inputs.labels.ndim == 1 else 0.0  # mixing smooths by itself
        return cross_entropies(self.logits(model, inputs), inputs.labels, smoothing)

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B, ranked]: the best classes."""
        logits = self.logits(model, inputs)
        return logits.topk(min(self.ranked, logits.shape[1])).indices

    def results(self, predictions: Tensor) -> list[str]:
        return [self.classes[best] for best in predictions[:, 0].tolist()]

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        return top_k(predictions, [example.label for example in examples])

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_classes(folder, [e.name for e in examples], predictions[:, 0].tolist())
