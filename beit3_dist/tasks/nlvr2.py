"""Whether a sentence is true of two pictures, as in NLVR2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from beit3_dist.tasks.examples import Example
from beit3_dist.tasks.heads import FineTuned
from beit3_dist.tasks.submissions import write_nlvr2
from beit3_dist.tasks.task import Task, TaskInputs, cross_entropies


class NLVR2(Task):
    """Labels: int64 [B], 1 where the sentence is true."""

    metric = "accuracy"

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        keep = inputs.keep(torch.cat([inputs.keys, ~inputs.keys]))  # the second pictures draw for themselves
        return cross_entropies(model.truth_logits(inputs.images, inputs.words, inputs.padding, keep), inputs.labels)

    def predict(self, model: FineTuned, inputs: TaskInputs, agree: Callable[[bool], bool]) -> Tensor:
        """int64 [B]: 1 for true."""
        return model.truth_logits(inputs.images, inputs.words, inputs.padding).argmax(1)

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        right = sum(p == example.label for p, example in zip(predictions.tolist(), examples, strict=True))
        return {"accuracy": right / len(examples)}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_nlvr2(folder, [e.name for e in examples], [bool(p) for p in predictions.tolist()])
