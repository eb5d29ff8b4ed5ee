"""Whether an image is mostly red: a task that the package does not know.

A line of its index: {"file": PATH, "red": true or false}.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.tasks.base import Task, TaskInputs, cross_entropies
from beit3_dist.tasks.data.examples import Example, Malformed, Record, Rules
from beit3_dist.tasks.parts.heads import ClassHead, FineTuned, TaskHead
from beit3_dist.tasks.parts.submissions import write_csv
from beit3_dist.tasks.registry import register


@register("mostly_red")
class MostlyRed(Task):
    """Labels: int64 [B], 1 where the image is."""

    has_classifier = True

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        if not isinstance(record.get("red"), bool):
            raise Malformed("the field 'red' is neither true nor false")
        (path,) = rules.paths(record, "file")
        return Example(number, (path,), None, int(record["red"]), path.name)

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return ClassHead(config.width, 2)

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        return cross_entropies(self.logits(model, inputs), inputs.labels)

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        return self.logits(model, inputs).argmax(1)

    def results(self, predictions: Tensor) -> list[bool]:
        return predictions.bool().tolist()

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        right = [p == example.label for p, example in zip(predictions.tolist(), examples, strict=True)]
        return {"accuracy": sum(right) / len(right)}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_csv(folder / "mostly_red.csv", zip([e.name for e in examples], self.results(predictions), strict=True))
