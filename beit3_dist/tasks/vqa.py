"""Visual question answering as classification over a list of answers, as in VQA v2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from beit3_dist.config import ModelConfig
from beit3_dist.tasks.base import Task, TaskInputs
from beit3_dist.tasks.data.examples import Example, Malformed, Record, Rules, integer, strings
from beit3_dist.tasks.data.vqa_answers import accuracy
from beit3_dist.tasks.parts.heads import FineTuned, PooledHead, TaskHead
from beit3_dist.tasks.parts.submissions import write_results
from beit3_dist.tasks.registry import register

PEOPLE = 10


@register("vqa")
class VQA(Task):
    """Labels: scores of the answers, float [B, answers] in [0, 1]; several answers may be right."""

    reads_text = needs_names = keeps_names = has_classifier = True
    one_prediction = "qid"
    serves = ("answer",)

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        labels, scores = record.get("labels"), record.get("scores")
        if not isinstance(labels, list) or not isinstance(scores, list) or len(labels) != len(scores):
            raise Malformed("the fields 'labels' and 'scores' are not two lists of one length")
        if rules.train and not labels:
            raise Malformed("no answer to learn from: 'labels' is empty")
        for label in labels:
            integer({"label": label}, "label", rules.classes)
        if not all(type(score) in (int, float) and 0 <= score <= 1 for score in scores):
            raise Malformed("a score is not in [0, 1]")
        answers = {label: float(score) for label, score in zip(labels, scores, strict=True)}
        name, people = str(integer(record, "qid")), strings(record, "answers")
        return Example(number, rules.paths(record, "image_path"), rules.words(record), answers, name, people)

    @staticmethod
    def labels(examples: Sequence[Example], classes: int) -> Tensor:
        scores = torch.zeros(len(examples), classes)
        for row, example in enumerate(examples):
            for answer, score in example.label.items():
                scores[row, answer] = score
        return scores

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return PooledHead(config.width, classes)

    def logits(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Of the answers [B, answers], from CLS; with fusion layers, in which CLS rests, from <s> (ALBEF)."""
        keep = inputs.keep(inputs.keys)
        hidden = model.encode(inputs.images[:, 0], inputs.words, inputs.padding, keep=keep)
        return model.task_head(hidden[:, 1 + model.config.patches :] if model.config.fusion_layers else hidden)

    def chances(self, logits: Tensor) -> Tensor:
        """Each answer's own: several may be right."""
        return logits.sigmoid()

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Binary cross-entropy of every answer, summed over the answers."""
        logits = self.logits(model, inputs)
        losses = binary_cross_entropy_with_logits(logits.float(), inputs.labels, reduction="none").sum(1)
        return torch.stack([losses, inputs.labels.gather(1, logits.argmax(1, keepdim=True))[:, 0]])

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B]: the best answer."""
        return self.logits(model, inputs).argmax(1)

    def results(self, predictions: Tensor) -> list[str]:
        return [self.classes[best] for best in predictions.tolist()]

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
        write_answers(folder, self.results(predictions), examples)


def write_answers(folder: Path, answers: Sequence[str], examples: Sequence[Example]) -> None:
    """vqa_results.json, as the benchmark takes it."""
    ids = [example.name for example in examples]
    write_results(folder / "vqa_results.json", ids, "question_id", answers, "answer")
