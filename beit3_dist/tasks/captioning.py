"""Words for an image: masked words of the caption are recovered in UniLM's order, and written by beam search.

A model with a decoder learns to write the caption word by word with it instead, after the image and <s> (mPLUG)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.data.order import Numbers
from beit3_dist.model.decoding import caption_mask
from beit3_dist.model.text_decoder import decoder_group
from beit3_dist.objectives.masking import mask_words
from beit3_dist.parallel.collectives import all_gather
from beit3_dist.tasks.base import Task, TaskInputs, cross_entropies
from beit3_dist.tasks.data.examples import Example, Record, Rules, integer, strings
from beit3_dist.tasks.parts.generation import generate, padded
from beit3_dist.tasks.parts.heads import FineTuned
from beit3_dist.tasks.parts.metrics import caption_scores, check_caption_metrics
from beit3_dist.tasks.parts.submissions import write_results
from beit3_dist.tasks.registry import register


def masked_words(ratio: float, words: int) -> int:
    """How many of a caption's words, </s> included, are masked: unilm's count, a share of the caption with <s> too,
    although <s> itself is never masked."""
    return max(1, min(int(ratio * (words + 1) + 0.5), words))


def weights_of_the_better(losses: Tensor, worst: float, room: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """What the losses [M] of this rank's words in a micro-batch weigh: 0 where they are among the greatest `worst` of
    all ranks' words; the others share the weight of all, so that the mean over all words is the mean over the kept.

    unilm sorts the words of each process for itself; over all ranks of `group` the words that are dropped do not depend
    on their number. `room`: the most words that a rank can have. Words as bad as the last kept one are kept too.
    """
    everyones = losses.new_full((room,), torch.inf)  # of one length on all ranks
    everyones[: len(losses)] = losses
    if group is not None and group.size() > 1:
        everyones = all_gather(everyones, group)
    words = (everyones != torch.inf).sum()  # numbers stay on the device, which the host does not wait for
    last_kept = (words.double() * (1 - worst)).long().clamp(min=1) - 1
    limit = everyones.sort().values.index_select(0, last_kept[None])
    return (losses <= limit) * (words / (everyones <= limit).sum())


@register("captioning")
class Captioning(Task):
    """Labels: number of the image, int64 [B]. `targets`: the words to recover, -1 where there is nothing to."""

    writes = True
    one_prediction = "image_id"
    usual_text_length: ClassVar[int | None] = 32  # unilm's
    pretrained_by = "prefix_language_modeling"
    serves = ("caption",)

    def examples(self, train: bool) -> Sequence[Example]:
        if not train:
            check_caption_metrics(self.config.eval.caption_metrics)
        return super().examples(train)

    @staticmethod
    def read(number: int, record: Record, rules: Rules) -> Example:
        image, people = integer(record, "image_id"), strings(record, "captions")
        to_write = not rules.train and record.get("text_segment") is None
        words = None if to_write else rules.words(record)
        return Example(number, rules.paths(record, "image_path"), words, image, str(image), people)

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> None:
        return None

    def mask(self, words: Tensor, padding: Tensor, keys: list[int]) -> tuple[Tensor, Tensor | None]:
        """Masks words and </s>, never <s>; of the masked ones 80 % become <mask> and 10 % a random word. For a decoder
        nothing is masked, and each word's next one is told."""
        if self.config.model.decoder_layers:
            following = words.where(~padding, -1).roll(-1, dims=1)
            following[:, -1] = -1
            return words, following
        tokenizer = self.tokenizer
        inputs, predict = mask_words(
            words.numpy(),
            Numbers(keys, 0),
            ratio=self.config.caption_mask_ratio,
            specials=(tokenizer.bos, tokenizer.pad),
            mask_id=tokenizer.mask,
            words=tokenizer.words,
            mask_token_share=0.8,
            random_token_share=0.1,
            count=masked_words,
        )
        return torch.from_numpy(inputs), words.where(torch.from_numpy(predict), -1)

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Cross-entropy with label smoothing of the words to tell, [2, M]; late in training without the worst ones."""
        assert inputs.targets is not None and inputs.told is not None
        logits = model.text_head(self._words(model, inputs).flatten(0, 1).index_select(0, inputs.told))
        targets = inputs.targets.flatten().index_select(0, inputs.told)
        losses, right = cross_entropies(logits, targets, self.config.label_smoothing)
        if self.config.drop_worst_ratio > 0 and inputs.step > self.config.drop_worst_after:
            room, group = len(inputs.targets) * self.config.data.text_length, self.replicas.group
            losses = losses * weights_of_the_better(losses.detach(), self.config.drop_worst_ratio, room, group)
        return torch.stack([losses, right])

    def _words(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Hidden states of the captions' words, [B, L, D]."""
        images, words, keep = inputs.images[:, 0], inputs.words, inputs.keep(inputs.keys)
        patches = 1 + model.config.patches
        if not model.config.decoder_layers:
            mask = caption_mask(patches, words.shape[1])  # on the host, as the padding is
            return model.encode(images, words, inputs.padding, attention_mask=mask, keep=keep)[:, patches:]
        read = inputs.padding.new_ones(len(words), patches + 1)
        group = decoder_group(read, inputs.padding).to(words.device)
        places = group.positions(words.device)
        packed = words.flatten() if group.index is None else words.flatten()[group.index]
        memory = model.encode(images, words[:, :1], keep=keep)
        return replace(group, patches=0).by_sample(model.decoder(memory, packed, places, group))

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """int64 [B, text_length]: captions, padded."""
        settings, images = self.config.eval, inputs.images[:, 0]
        return self.caption(model, images, settings.beams, settings.length_penalty, agree=inputs.agree)

    def caption(
        self,
        model: FineTuned,
        images: Tensor,
        beams: int,
        length_penalty: float,
        max_words: int | None = None,
        agree: Callable[[bool], bool] = lambda done: done,
    ) -> Tensor:
        """int64 [B, 1 + max_words]: captions of images [B, 3, S, S], padded; see `generate`. `max_words`: as in
        training unless said otherwise."""
        longest = self.config.data.text_length - 1 if max_words is None else max_words
        captions = generate(
            model,
            images,
            self.tokenizer,
            beams=beams,
            length_penalty=length_penalty,
            max_words=longest,
            at_mask=not self.pretrained and not model.config.decoder_layers,
            agree=agree,
        )
        return padded(captions, 1 + longest, self.tokenizer.pad, images.device)

    def results(self, predictions: Tensor) -> list[str]:
        return [self.tokenizer.decode(words) for words in predictions.tolist()]

    def _written(self, predictions: Tensor, examples: Sequence[Example]) -> dict[int, tuple[str, str]]:
        """Image -> its name and caption, once however many references it has."""
        texts = self.results(predictions)
        return {int(e.label): (e.name, text) for e, text in zip(examples, texts, strict=True)}

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        references: dict[int, list[str]] = {}
        for example in examples:
            own = example.references or ((self.tokenizer.decode(list(example.words)),) if example.words else ())
            references.setdefault(int(example.label), []).extend(own)
        references = {image: texts for image, texts in references.items() if texts}
        if not references:
            return {}
        written = {image: text for image, (_, text) in self._written(predictions, examples).items()}
        return caption_scores(
            {image: written[image] for image in references}, references, self.config.eval.caption_metrics
        )

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        ids, captions = zip(*self._written(predictions, examples).values(), strict=True)
        write_results(folder / "captions_results.json", ids, "image_id", captions, "caption")
