"""Visual question answering by words: the answer is written after image and question, whatever it may be.

Image and question, framed by <s> and </s>, see one another; the answer, framed again, follows them word after word, and
each of its words tells the next one (ALBEF's and mPLUG's answer decoders learn the same; here the model itself writes,
or its decoder where it has one). An example's answer is the one with the highest score of its labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.data.text import TextTokenizer
from beit3_dist.model.decoding import Questions
from beit3_dist.model.text_decoder import decoder_group
from beit3_dist.model.token_layout import prefix_mask
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.captioning import Captioning
from beit3_dist.tasks.config import WRITTEN
from beit3_dist.tasks.data.examples import Example, Record, Rules
from beit3_dist.tasks.data.vqa_answers import accuracy, normalised
from beit3_dist.tasks.parts.generation import generate, padded
from beit3_dist.tasks.parts.heads import FineTuned
from beit3_dist.tasks.registry import register
from beit3_dist.tasks.vqa import PEOPLE, VQA, write_answers


class Answered(Sequence[Example]):
    """Examples whose text is the question and, behind its </s> and another <s>, the best answer."""

    def __init__(self, examples: Sequence[Example], answers: Sequence[Sequence[int]], longest: int) -> None:
        """`answers`: token ids by the answers' numbers. `longest`: tokens of a text; the question is cut to it."""
        self.examples, self.answers, self.longest = examples, answers, longest

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: Any) -> Any:
        example = self.examples[place]
        answer = self.answers[max(example.label, key=example.label.get)]
        return replace(example, words=joined_words(example.words or (), answer, self.longest))


def joined_words(question: Sequence[int], answer: Sequence[int], longest: int) -> tuple[int, ...]:
    """A question and its answer without the outer <s> and </s>."""
    room = max(0, longest - 4 - len(answer))
    return (*question[:room], TextTokenizer.eos, TextTokenizer.bos, *answer)


@register("open_vqa")
class OpenVQA(Captioning):
    """`targets`: the words of the answer, each at the one before it. Nothing is learnt from labels."""

    reads_text = needs_names = True
    one_prediction = "qid"
    usual_text_length = None
    pretrained_by = ""
    serves = ("answer",)

    def examples(self, train: bool) -> Sequence[Example]:
        """In training with their answers."""
        examples = super().examples(train)
        if not train:
            return examples
        answers = [self.tokenizer.encode(answer) for answer in self.classes]
        return Answered(examples, answers, self.config.data.text_length)

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        return VQA.read(number, record, rules)

    @property
    def outcomes(self) -> Sequence[str]:
        """None: the answers are written, whatever they may be."""
        return ()

    @staticmethod
    def labels(examples: Sequence[Example], classes: int) -> Tensor:
        return torch.zeros(len(examples))

    def mask(self, words: Tensor, padding: Tensor, keys: list[int]) -> tuple[Tensor, Tensor | None]:
        """Nothing is masked."""
        following = words.where(~padding, -1).roll(-1, dims=1)
        following[:, -1] = -1
        return words, following.where(self._answers(words), -1)

    def _answers(self, words: Tensor) -> Tensor:
        """bool [B, L]: from the second <s> on."""
        return (words == self.tokenizer.bos).cumsum(1) == 2

    def _words(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        images, words, keep = inputs.images[:, 0], inputs.words, inputs.keep(inputs.keys)
        patches, given = 1 + model.config.patches, words.cpu()  # layouts are made on the host
        asked = (~self._answers(given) & ~inputs.padding).sum(1)
        if not model.config.decoder_layers:
            mask = prefix_mask(patches, words.shape[1], asked)
            return model.encode(images, words, inputs.padding, attention_mask=mask, keep=keep)[:, patches:]
        length = int(asked.max())
        no_question = torch.arange(length) >= asked[:, None]
        memory = model.encode(images, words[:, :length], no_question, keep=keep)
        read = torch.cat([no_question.new_ones(len(words), patches), ~no_question], dim=1)
        group = decoder_group(read, inputs.padding | ~self._answers(given))
        index = group.index if group.index is not None else torch.arange(given.numel())
        places = index % words.shape[1] - asked[index // words.shape[1]]  # the answer's own positions
        moved = group.to(words.device)
        written = model.decoder(memory, given.flatten()[index].to(words.device), places.to(words.device), moved)
        return replace(moved, patches=0).by_sample(written)

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B, WRITTEN]: answers, padded."""
        settings, images = self.config.eval, inputs.images[:, 0]
        answers = generate(
            model,
            images,
            self.tokenizer,
            beams=settings.beams,
            length_penalty=settings.length_penalty,
            max_words=WRITTEN,
            at_mask=False,
            agree=inputs.agree,
            questions=Questions(inputs.words, inputs.padding),
        )
        return padded(answers, WRITTEN, self.tokenizer.pad, images.device)

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Accuracy as `VQA`'s, of what is written: by the official rule, else the score of the label that it is; and
        how often it is the best label, or what most people said. Both in the benchmark's normal form."""
        numbers = {normalised(name): number for number, name in enumerate(self.classes)}
        right, exact = [], []
        for text, example in zip(self.results(predictions), examples, strict=True):
            labels, people, said = example.label, [*map(normalised, example.references)], normalised(text)
            if not labels and not people:
                continue
            by_label = labels.get(numbers.get(said), 0.0)
            right.append(accuracy(text, example.references) if len(people) == PEOPLE else by_label)
            best = normalised(self.classes[max(labels, key=labels.get)]) if labels else max(people, key=people.count)
            exact.append(said == best)
        return {"vqa_accuracy": sum(right) / len(right), "exact_match": sum(exact) / len(exact)} if right else {}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_answers(folder, self.results(predictions), examples)
