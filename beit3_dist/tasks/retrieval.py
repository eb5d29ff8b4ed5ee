"""Pictures and texts as vectors that lie close where they belong together: retrieval, and the contrastive step before
it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from beit3_dist.parallel.collectives import Gather
from beit3_dist.tasks.examples import Example
from beit3_dist.tasks.heads import FineTuned
from beit3_dist.tasks.metrics import first_rows, recall
from beit3_dist.tasks.submissions import write_retrieval
from beit3_dist.tasks.task import Task, TaskInputs, shares


class Retrieval(Task):
    """Image-text contrast over the examples of all ranks. Labels: number of the picture, int64 [B]."""

    metric = "mean_recall"

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Mean of the two cross-entropies of telling an example's text from all texts and its picture from all."""
        keep = inputs.keep(inputs.keys), inputs.keep(~inputs.keys)  # either side draws for itself
        images, texts, scale = model.embeddings(inputs.images[:, 0], inputs.words, inputs.padding, keep)
        assert images is not None and texts is not None
        return contrastive_losses(images.float(), texts.float(), scale.float(), self._group)

    def predict(self, model: FineTuned, inputs: TaskInputs, agree: Callable[[bool], bool]) -> Tensor:
        """float [B, 2, D]: vectors of the picture and of the text."""
        images, texts, _ = model.embeddings(inputs.images[:, 0], inputs.words, inputs.padding)
        assert images is not None and texts is not None
        return torch.stack([images, texts], dim=1).float()

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """Recall at 1, 5 and 10 both ways, each picture counted once however many texts it has, and their mean."""
        of_text = [int(example.label) for example in examples]
        first = first_rows(of_text)
        numbers = {picture: number for number, picture in enumerate(first)}
        scores = recall(
            predictions[list(first.values()), 0], predictions[:, 1], torch.tensor([numbers[p] for p in of_text])
        )
        return scores | {"mean_recall": sum(scores.values()) / len(scores)}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        write_retrieval(folder, [e.name for e in examples], predictions[:, 0], predictions[:, 1])


def contrastive_losses(images: Tensor, texts: Tensor, scale: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[2, b]: each local example's loss, and the mean of its two hits, from unit vectors [b, D] of this rank's
    examples. All ranks of `group` hold equally many; gradients flow to the other ranks' vectors too."""
    everyones = lambda x: x if group is None or group.size() == 1 else Gather.apply(x, group)  # noqa: E731
    rank = 0 if group is None else group.rank()
    place = torch.arange(len(images), device=images.device) + rank * len(images)
    by_image = scale * images @ everyones(texts).T
    by_text = scale * texts @ everyones(images).T
    losses = cross_entropy(by_image, place, reduction="none") + cross_entropy(by_text, place, reduction="none")
    return torch.stack([losses / 2, (shares(by_image, place) + shares(by_text, place)) / 2])
