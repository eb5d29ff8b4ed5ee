"""The one objective: recover masked patches (as visual codes) and masked words, from images, texts and pairs alike.

Each of the four losses is the sum of its cross-entropies over the whole step divided by the step's global number of
masked positions. Means of means would be wrong: the counts differ per rank and micro-batch. A micro-batch therefore
contributes `sum / count of the step`, and the contributions of all micro-batches and ranks add up to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from beit3_dist.config import ObjectiveConfig
from beit3_dist.model.beit3 import BEiT3, MixedInputs
from beit3_dist.model.drop_path import drop_path_factors
from beit3_dist.model.layout import Selection

STREAMS = ("image", "text", "pair_image", "pair_text")
"""The four losses, in the order of every vector of statistics."""


@dataclass(frozen=True)
class Targets:
    """What the heads have to recover, and where. Image-only rows come before pairs', pairs' words before texts'."""

    image_rows: Tensor
    """int64 [Mi + Mpi]: masked patches as rows of the token matrix."""
    codes: Tensor
    """int64 [Mi + Mpi]: their visual codes."""
    text_rows: Tensor
    """int64 [Mpt + Mt]: masked words as rows of the token matrix."""
    words: Tensor
    """int64 [Mpt + Mt]: their ids."""
    counts: tuple[int, int, int, int]
    """Masked positions per loss, in the order of STREAMS."""

    @property
    def selection(self) -> Selection:
        """The tokens whose last hidden states the heads read: the masked ones, patches before words."""
        image, text, pair_image, pair_text = self.counts
        return Selection(rows=torch.cat([self.image_rows, self.text_rows]), counts=(image, pair_image, pair_text, text))


class MaskedDataModeling(nn.Module):
    """The model under its objective."""

    def __init__(self, model: BEiT3, config: ObjectiveConfig, seed: int) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        self.weights = config.weights

    def forward(
        self, inputs: MixedInputs, targets: Targets, sample_ids: Tensor, step_counts: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """One pass over the mixed micro-batch.

        Returns the micro-batch's contribution to the step's loss (a scalar to go backward from) and the statistics
        [2, 4]: sums of cross-entropies and correct predictions, in the order of STREAMS. `step_counts` [4]: masked
        positions of the whole step over all ranks. `sample_ids` [samples] and `step` key the drop path in training.
        """
        inputs = self.with_drop_path(inputs, sample_ids, step)
        return self.losses(self.model.hidden(inputs, targets.selection), targets, step_counts)

    def with_drop_path(self, inputs: MixedInputs, sample_ids: Tensor, step: int) -> MixedInputs:
        """The inputs with the drop-path factors of this step; unchanged in evaluation."""
        config = self.model.config
        if not self.training or config.drop_path == 0:
            return inputs
        factors = drop_path_factors(sample_ids, seed=self.seed, step=step, layers=config.layers, rate=config.drop_path)
        return replace(inputs, keep=factors)

    def losses(self, hidden_MD: Tensor, targets: Targets, step_counts: Tensor) -> tuple[Tensor, Tensor]:
        """The contribution to the loss and the statistics [2, 4] from the last block's hidden states of the selected
        tokens."""
        image, text, pair_image, pair_text = targets.counts
        patches, words = hidden_MD.split([len(targets.image_rows), len(targets.text_rows)])
        image_sums = _sums(self.model.image_losses(patches, targets.codes), [image, pair_image])
        text_sums = _sums(self.model.text_losses(words, targets.words), [pair_text, text])
        statistics = torch.stack([image_sums[0], text_sums[1], image_sums[1], text_sums[0]], dim=1)
        # Weights as Python's numbers: the host would wait for the copy of a tensor to the device.
        weighted = torch.stack([weight * loss for weight, loss in zip(self.weights, statistics[0], strict=True)])
        return (weighted / step_counts.clamp(min=1)).sum(), statistics.detach()


def _sums(losses_2M: Tensor, splits: list[int]) -> list[Tensor]:
    """Per split of the rows: [sum of the cross-entropies, number of correct predictions]."""
    return [part.sum(1) for part in losses_2M.split(splits, dim=1)]
