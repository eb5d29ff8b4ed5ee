"""The mean colour of each masked patch: an objective that the package does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import SeenImages
from beit3_dist.image_tokenizer.drawing import patches_of
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import Loss, Objective, Places, View
from beit3_dist.objectives.registry import register


@dataclass(kw_only=True)
class MeanColourConfig:
    """Mean colours."""

    weight: float = 1.0
    """Weight of the loss."""


@register
class MeanColour(Objective):
    """One loss: the mean squared error of red, green and blue, each in [0, 1]."""

    name = "mean_colour"
    Config = MeanColourConfig
    masked_by = "masked_data_modeling"

    def __init__(self, config: MeanColourConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        self.losses = [Loss(self.name, config.weight, has_accuracy=False, title="mean colours", unit="per patch")]
        self.views = [View(s.field, True, s.has_text, self.masked_by) for s in self.streams if s.has_images]

    def head(self) -> nn.Module:
        return nn.Linear(self.model.width, 3)

    def _masked(self, batch: MicroBatch) -> Iterator[tuple[View, Tensor]]:
        return ((v, batch.streams[v.stream].annotations[self.masked_by]["image_mask"]) for v in self.views)

    def counts(self, batch: MicroBatch) -> list[int]:
        return [sum(int(mask.sum()) for _, mask in self._masked(batch))]

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        return torch.cat([places.patches(view, mask) for view, mask in self._masked(batch)])

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> Tensor:
        """float32 [M, 3]."""
        size, masked = self.model.patch_size, [(v, m.flatten().nonzero().squeeze(1)) for v, m in self._masked(batch)]
        patches = torch.cat([patches_of(seen.images[view.stream], size)[move(rows)] for view, rows in masked])
        return patches.float().mean((2, 3)) / 255

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Tensor) -> Tensor:
        colours = model.objective_heads[self.name](model.norm[model.norm.experts[0]](hidden_MD))
        total = (colours.float() - targets).square().mean(1).sum()
        return torch.stack([total, torch.zeros_like(total)])[:, None]
