"""Classes of sentences: the language encoder alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.tasks.base import Task, TaskInputs, cross_entropies
from beit3_dist.tasks.data.examples import Example, Record, Rules, integer
from beit3_dist.tasks.parts.heads import FineTuned, PooledHead, TaskHead
from beit3_dist.tasks.parts.metrics import top_k
from beit3_dist.tasks.parts.submissions import write_classes
from beit3_dist.tasks.registry import register


@register("text")
class Sentences(Task):
    """Labels: classes int64 [B]."""

    metric = "top1"
    images = 0
    reads_text = needs_names = has_classifier = True
    serves = ("classify",)

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        return Example(number, (), rules.words(record), integer(record, "label", rules.classes), str(number))

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return PooledHead(config.width, classes)

    def logits(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """[B, classes]."""
        return model.task_head(model.encode(None, inputs.words, inputs.padding, keep=inputs.keep(inputs.keys)))

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        return cross_entropies(self.logits(model, inputs), inputs.labels, self.config.label_smoothing)

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B, 1]: the best class."""
        return self.logits(model, inputs).argmax(1, keepdim=True)

    def results(self, predictions: Tensor) -> list[str]:
        """The best class of each sentence."""
        return [self.classes[best] for best in predictions[:, 0].tolist()]

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        return {"top1": top_k(predictions, [example.label for example in examples])["top1"]}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_classes(folder, [e.name for e in examples], predictions[:, 0].tolist())
