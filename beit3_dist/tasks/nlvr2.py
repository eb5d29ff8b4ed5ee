"""Whether a sentence is true of two images, as in NLVR2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.tasks.base import Task, TaskInputs, cross_entropies
from beit3_dist.tasks.data.examples import Example, Record, Rules, integer, string
from beit3_dist.tasks.parts.heads import FineTuned, TaskHead
from beit3_dist.tasks.parts.submissions import write_csv
from beit3_dist.tasks.registry import register


@register("nlvr2")
class NLVR2(Task):
    """Labels: int64 [B], 1 where the sentence is true."""

    images = 2
    reads_text = has_classifier = True
    one_prediction = "identifier"
    serves = ("is_true",)

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        paths, name = rules.paths(record, "image_path", "image2_path"), string(record, "identifier")
        return Example(number, paths, rules.words(record), integer(record, "label", 2), name)

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return PairOfImagesHead(config.width)

    def logits(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Of false and true, [B, 2]. Each image gets its own pass with the sentence."""
        first_then_second = inputs.images.transpose(0, 1).flatten(0, 1)
        words, padding = inputs.words.repeat(2, 1), inputs.padding.repeat(2, 1)
        keep = inputs.keep(torch.cat([inputs.keys, ~inputs.keys]))  # the second images draw for themselves
        hidden = model.encode(first_then_second, words, padding, keep=keep)
        tokens_2B2D = hidden[:, [0, 1 + model.config.patches]].flatten(1)
        return model.task_head(torch.cat(tokens_2B2D.chunk(2), dim=1))

    @property
    def outcomes(self) -> Sequence[bool]:
        return (False, True)

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        return cross_entropies(self.logits(model, inputs), inputs.labels)

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B]: 1 for true."""
        return self.logits(model, inputs).argmax(1)

    def results(self, predictions: Tensor) -> list[bool]:
        return predictions.bool().tolist()

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        right = sum(p == example.label for p, example in zip(predictions.tolist(), examples, strict=True))
        return {"accuracy": right / len(examples)}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        """`identifier,True` or `identifier,False` a line, without a header."""
        rows = zip([example.name for example in examples], self.results(predictions), strict=True)
        write_csv(folder / "nlvr2_predictions.csv", rows)


class _TwoLayers(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(inputs)
        self.dense1 = Linear(inputs, hidden)
        self.norm2 = LayerNorm(hidden)
        self.act = nn.GELU()
        self.dense2 = Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(self.act(self.norm2(self.dense1(self.norm1(x)))))


class PairOfImagesHead(TaskHead):
    """CLS and <s> of two images with the same sentence, [B, 4 D] -> false or true, [B, 2]."""

    small = ("head.dense1.weight", "head.dense2.weight")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = _TwoLayers(4 * width, 2 * width, 2)

    def forward(self, tokens_B4D: Tensor) -> Tensor:
        return self.head(tokens_B4D)
