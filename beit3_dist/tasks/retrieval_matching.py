"""Retrieval in two steps: the best by their vectors, put in order by whether image and text match, read together.

As ALBEF fine-tunes for retrieval (Li et al. 2021): contrast, and matching of each pair, of its text with a drawn image
and of its image with a drawn text, where what looks more alike is drawn more often. Negatives come from the micro-batch
over all ranks, and have neither the image nor the text in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from beit3_dist.config import ModelConfig
from beit3_dist.data.order import mix
from beit3_dist.hashing import hash64_tensor
from beit3_dist.objectives.contrast import Vectors, joined
from beit3_dist.objectives.matching import MatchingHead
from beit3_dist.objectives.mining import draw_negatives, matching_losses, with_negatives
from beit3_dist.tasks.base import TaskInputs
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.parts.heads import FineTuned, TaskHead
from beit3_dist.tasks.parts.metrics import More, reranked, shortlists
from beit3_dist.tasks.registry import register
from beit3_dist.tasks.retrieval import (
    ContrastiveHead,
    Retrieval,
    images_and_owners,
    match_logits,
    mean_recalls,
    write_retrieval,
)


@dataclass(frozen=True)
class Ranked:
    """Predictions of all examples."""

    vectors: Tensor
    """float [N, 2, D]: of the image and of the text."""
    more: More | None
    """What matching adds to their products; None: nothing is put in order."""


class Pairs(Sequence[Example]):
    """Texts of some examples with images of others."""

    def __init__(self, examples: Sequence[Example], of_image: Tensor, of_text: Tensor) -> None:
        """int64 [P] each: the example whose image it is, and whose text."""
        self.examples, self.of_image, self.of_text = examples, of_image, of_text

    def __len__(self) -> int:
        return len(self.of_text)

    def __getitem__(self, place: Any) -> Any:
        return replace(self.examples[int(self.of_text[place])], images=self.examples[int(self.of_image[place])].images)


class TwoStepHead(ContrastiveHead):
    """Contrast's head, and `match` of <s> of a text that has seen its image: [B, D] -> no match and match, [B, 2]."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.match = MatchingHead(width, "linear")


@register("retrieval_matching")
class RetrievalMatching(Retrieval):
    """Retrieval whose model also tells what matches. Labels: number of the image, int64 [B]."""

    matched = 3
    pretrained_by = ""
    serves = ("embed_images", "embed_texts", "match")

    @classmethod
    def head(cls, config: ModelConfig, classes: int) -> TaskHead:
        return TwoStepHead(config.width)

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Contrast's, and the mean over a pair's three of matching; right is what contrast finds."""
        found = self.look(model, inputs)
        losses, _ = self._matching(model, inputs, found)
        matching = torch.stack([losses / self.matched, torch.zeros_like(losses)])
        return torch.cat([self.contrasted(found, inputs), matching], dim=1)

    def _matching(self, model: FineTuned, inputs: TaskInputs, found: Vectors) -> Tensor:
        """[2, 3 B]: losses and hits of each pair and of its two negatives."""
        (count, length), longest, device = inputs.words.shape, self.config.data.text_length, inputs.words.device
        words = pad(inputs.words, (0, longest - length), value=self.tokenizer.pad)  # of one length on all ranks
        held = [inputs.images[:, 0], words, (~inputs.padding).sum(1).to(device)]
        places = torch.arange(longest, device=device)
        texts = hash64_tensor(words ^ hash64_tensor(places)).sum(1)
        labels, key = torch.stack([inputs.labels, texts], dim=1), mix(self.config.seed, inputs.step)
        drawn = draw_negatives(joined([found]), labels, inputs.keys, self.replicas, key)
        shown = with_negatives(
            drawn, 0, inputs.keys, held, self.replicas, count, lambda rows: [some[rows.to(device)] for some in held]
        )
        lengths = shown.lengths.cpu()
        padding = torch.arange(int(lengths.max())) >= lengths[:, None]
        hidden = model.encode(shown.images, shown.words[:, : padding.shape[1]], padding, keep=inputs.keep(shown.ids))
        head: Any = model.task_head
        return matching_losses(head.match(hidden[:, 1 + model.config.patches]), shown.counted)

    def refined(
        self, predictions: Tensor, examples: Sequence[Example], predict: Callable[[Sequence[Example]], Tensor]
    ) -> Ranked:
        """With the order that matching gives the `eval.rerank` best, the images of a text and the texts of an image."""
        if not self.config.eval.rerank:
            return Ranked(predictions, None)
        first, _ = images_and_owners(examples)
        chosen = shortlists(predictions[first, 0], predictions[:, 1], self.config.eval.rerank)
        pairs = (chosen[0] | chosen[1]).nonzero()  # image by image
        logits = predict(Pairs(examples, torch.tensor(first)[pairs[:, 0]], pairs[:, 1]))
        return Ranked(predictions, reranked(chosen, pairs, logits))

    def predict_again(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """float [B]: how well the text fits the image."""
        head: Any = model.task_head
        return match_logits(model, head.match, inputs.images[:, 0], inputs.words, inputs.padding)

    def score(self, predictions: Any, examples: Sequence[Example]) -> dict[str, float]:
        return mean_recalls(predictions.vectors, examples, predictions.more)

    def write_predictions(self, folder: Path, predictions: Any, examples: Sequence[Example]) -> None:
        vectors = predictions.vectors
        write_retrieval(folder, [e.name for e in examples], vectors[:, 0], vectors[:, 1], predictions.more)
