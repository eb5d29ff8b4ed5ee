"""Classes of sentences: the language encoder alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from beit3_dist.tasks.examples import Example
from beit3_dist.tasks.heads import FineTuned
from beit3_dist.tasks.metrics import top_k
from beit3_dist.tasks.submissions import write_classes
from beit3_dist.tasks.task import Task, TaskInputs, cross_entropies


class Sentences(Task):
    """Labels: classes int64 [B]."""

    metric = "top1"

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        logits = model.sentence_logits(inputs.words, inputs.padding, inputs.keep(inputs.keys))
        return cross_entropies(logits, inputs.labels, self.config.label_smoothing)

    def predict(self, model: FineTuned, inputs: TaskInputs, agree: Callable[[bool], bool]) -> Tensor:
        """int64 [B, 1]: the best class."""
        return model.sentence_logits(inputs.words, inputs.padding).argmax(1, keepdim=True)

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        return {"top1": top_k(predictions, [example.label for example in examples])["top1"]}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_classes(folder, [e.name for e in examples], predictions[:, 0].tolist())
