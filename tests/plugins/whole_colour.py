"""The mean colour of a pair's image from the first token of the image alone, and of the caption alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import SeenImages
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import Loss, Objective, Places, View
from beit3_dist.objectives.registry import register


@dataclass(kw_only=True)
class WholeColourConfig:
    """Mean colours of whole images."""


@register
class WholeColour(Objective):
    """Two losses, mean squared errors; nothing is hidden from them."""

    name = "whole_colour"
    Config = WholeColourConfig

    def __init__(self, config: WholeColourConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        sides = {"image": View("pairs", True, False), "caption": View("pairs", False, True)}
        self.views = list(sides.values()) if run.batch.pairs else []
        self.losses = [Loss(f"colour_of_{side}", 1.0, has_accuracy=False, title=f"colours, {side}") for side in sides]

    def head(self) -> nn.Module:
        return nn.ModuleList(nn.Linear(self.model.width, 3) for _ in self.views)

    def counts(self, batch: MicroBatch) -> list[int]:
        return [len(batch.streams["pairs"])] * 2

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        return torch.cat([places.first(view) for view in self.views])

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> Tensor:
        """float32 [n, 3]."""
        return seen.images["pairs"].float().mean((2, 3)) / 255

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Tensor) -> Tensor:
        sides = zip(model.objective_heads[self.name], hidden_MD.chunk(2), strict=True)
        total = torch.stack([(head(hidden).float() - targets).square().mean(1).sum() for head, hidden in sides])
        return torch.stack([total, torch.zeros_like(total)])
