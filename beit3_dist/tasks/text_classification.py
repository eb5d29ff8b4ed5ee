"""Classes of sentences and of pairs of sentences, or a number for them, as in GLUE: the language encoder alone.

A pair is one text, `<s> first </s> second </s>`. With one name in data.answers it is what a number tells, such as how
alike two sentences are (STS-B), and the loss is a mean squared error; with more they are classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.data.text import TextTokenizer
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.data.examples import Example, Malformed, Record, Rules, integer, string
from beit3_dist.tasks.parts.heads import FineTuned
from beit3_dist.tasks.parts.metrics import agreement, correlations
from beit3_dist.tasks.registry import register
from beit3_dist.tasks.text import Sentences

NEAR = 0.5
"""A number is told right, for the accuracy that steps record, if it is no further off."""


def pair_words(first: Sequence[int], second: Sequence[int], longest: int) -> list[int]:
    """Two texts as one without the outer <s> and </s>, cut to `longest` tokens with them, the longer one first."""
    room = max(2, longest - 3)
    of_second = min(len(second), max(room - len(first), room // 2))
    return [*first[: room - of_second], TextTokenizer.eos, *second[:of_second]]


class Cut(Sequence[Example]):
    """Examples whose pairs are cut so that both sentences stay."""

    def __init__(self, examples: Sequence[Example], longest: int) -> None:
        self.examples, self.longest = examples, longest

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: Any) -> Any:
        example = self.examples[place]
        words = list(example.words or ())
        if TextTokenizer.eos not in words:
            return example
        end = words.index(TextTokenizer.eos)
        return replace(example, words=tuple(pair_words(words[:end], words[end + 1 :], self.longest)))


@register("text_classification")
class TextClassification(Sentences):
    """Labels: classes int64 [B], or numbers float [B]."""

    serves = ("classify", "classify_pairs")

    @property
    def is_number(self) -> bool:
        """Whether a number is told."""
        return len(self.classes) == 1

    @property
    def outcomes(self) -> Sequence[str]:
        return [] if self.is_number else self.classes

    def examples(self, train: bool) -> Sequence[Example]:
        return Cut(super().examples(train), self.config.data.text_length)

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        words, label = rules.words(record), record.get("label")
        if "text_segment2" in record:
            words = (*words, TextTokenizer.eos, *rules.words(record, "text_segment2"))
        if label is None and not rules.train:
            pass  # of a test set
        elif rules.classes == 1:
            if type(label) not in (int, float):
                raise Malformed("no number in the field 'label'")
        else:
            label = integer(record, "label", rules.classes)
        return Example(number, (), words, label, string(record, "idx") if "idx" in record else str(number))

    @staticmethod
    def labels(examples: Sequence[Example], classes: int) -> Tensor:
        known = [-1 if example.label is None else example.label for example in examples]
        return torch.tensor(known, dtype=torch.float32 if classes == 1 else torch.int64)

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        if not self.is_number:
            return super().losses(model, inputs)
        off = self.logits(model, inputs)[:, 0].float() - inputs.labels
        return torch.stack([off.square(), (off.abs() <= NEAR).float()])

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B, 1]: the best class, or the number as float."""
        return self.logits(model, inputs).float() if self.is_number else super().predict(model, inputs)

    def results(self, predictions: Tensor) -> list[Any]:
        return predictions[:, 0].tolist() if self.is_number else super().results(predictions)

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """GLUE's: accuracy, Matthews' correlation and, of two classes, F1 of the second; of numbers Pearson's and
        Spearman's correlations."""
        told, known = predictions[:, 0].tolist(), [example.label for example in examples]
        pairs = [(guess, label) for guess, label in zip(told, known, strict=True) if label is not None]
        if not pairs:
            return {}
        guesses, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
        return correlations(guesses, labels) if self.is_number else agreement(guesses, labels, len(self.classes))

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        """predictions.tsv, `index` and `prediction`, as GLUE's server takes it."""
        rows = zip([example.name for example in examples], self.results(predictions), strict=True)
        lines = ["index\tprediction", *(f"{name}\t{result}" for name, result in rows)]
        (folder / "predictions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
