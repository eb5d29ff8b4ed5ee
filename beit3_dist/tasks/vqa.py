"""Visual question answering as classification over a list of answers, as in VQA v2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from beit3_dist.tasks.examples import Example
from beit3_dist.tasks.heads import FineTuned
from beit3_dist.tasks.submissions import write_vqa
from beit3_dist.tasks.task import Task, TaskInputs
from beit3_dist.tasks.vqa_answers import accuracy

PEOPLE = 10
"""People who answer a question of VQA v2."""


class VQA(Task):
    """Labels: scores of the answers, float [B, answers] in [0, 1]; several answers may be right."""

    metric = "vqa_accuracy"

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Binary cross-entropy of every answer, summed over the answers."""
        logits = model.answer_logits(inputs.images[:, 0], inputs.words, inputs.padding, inputs.keep(inputs.keys))
        losses = binary_cross_entropy_with_logits(logits.float(), inputs.labels, reduction="none").sum(1)
        return torch.stack([losses, inputs.labels.gather(1, logits.argmax(1, keepdim=True))[:, 0]])

    def predict(self, model: FineTuned, inputs: TaskInputs, agree: Callable[[bool], bool]) -> Tensor:
        """int64 [B]: the best answer."""
        return model.answer_logits(inputs.images[:, 0], inputs.words, inputs.padding).argmax(1)

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Accuracy by the official rule where the index has what ten people answered, else the labels' scores; over
        the questions that somebody has answered."""
        scores = [
            accuracy(self.classes[answer], example.references)
            if len(example.references) == PEOPLE
            else example.label.get(answer, 0.0)
            for answer, example in zip(predictions.tolist(), examples, strict=True)
            if example.references or example.label
        ]
        return {"vqa_accuracy": sum(scores) / len(scores)} if scores else {}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_vqa(folder, [e.name for e in examples], [self.classes[p] for p in predictions.tolist()])
