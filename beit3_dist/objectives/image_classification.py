"""Classification of images alone: what a whole image shows, from CLS, by the .cls members of the image shards.

ViT-BERT (Li et al. 2021) trains its shared encoder so beside masked words; it also warms up a vision expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from beit3_dist.config import RunConfig, require
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.order import Stream
from beit3_dist.data.streams import Sample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import Loss, Objective, Places, View

NAME = "image_classification"
SECTION = f"objectives.{NAME}"


@dataclass(kw_only=True)
class ImageClassificationConfig:
    """Classification of images alone."""

    classes: int = 0
    """How many classes the .cls members beside the images tell apart; it must be given."""
    label_smoothing: float = 0.1
    """Share of a target that all classes have alike (Szegedy et al. 2016; ViT-BERT does not say)."""
    weight: float = 1.0
    """Weight of the loss."""

    def __post_init__(self) -> None:
        require(self.classes >= 0, f"{SECTION}.classes={self.classes} is negative")
        require(0 <= self.label_smoothing < 1, f"{SECTION}.label_smoothing={self.label_smoothing} is not in [0, 1)")
        require(self.weight > 0, f"{SECTION}.weight={self.weight} must be positive")


class ImageClassification(Objective):
    """One loss: the cross-entropy of an image's class, with label smoothing."""

    name = NAME
    Config = ImageClassificationConfig

    def __init__(self, config: ImageClassificationConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        require(config.classes > 1, f"{SECTION}.classes={config.classes}: give the number of classes, two at least")
        self.views = [View("images", True, False)] if run.batch.images else []
        remedy = "the class {}: are these the .cls members that you mean?"
        self.losses = [
            Loss("image_class", config.weight, title="classes of images", unit="image", classes=config.classes,
                 remedy=remedy, stream="images")
        ]  # fmt: skip
        self.label_classes = config.classes

    def head(self) -> nn.Module:
        return Linear(self.model.width, self.config.classes)

    def annotate(
        self, stream: Stream, samples: Sequence[Sample], text: np.ndarray | None, tokenizer: TextTokenizer
    ) -> dict[str, Tensor]:
        """`label` int64 [n] of images alone."""
        if stream is not Stream.IMAGES:
            return {}
        return {"label": torch.tensor([sample.label for sample in samples], dtype=torch.int64)}

    def counts(self, batch: MicroBatch) -> list[int]:
        return [len(batch.streams["images"])]

    def targets_by_sample(self, batch: MicroBatch) -> list[Tensor]:
        return [torch.ones(len(batch.streams["images"]), dtype=torch.int64)]

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        return places.first(self.views[0])

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> Tensor:
        """int64 [n]."""
        return move(batch.streams["images"].annotations[self.name]["label"])

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Tensor) -> Tensor:
        logits = model.objective_heads[self.name](model.image_norm(hidden_MD)).float()
        smoothing, hits = self.config.label_smoothing, logits.argmax(1) == targets
        apart = cross_entropy(logits.detach(), targets, reduction="none", label_smoothing=smoothing)
        self.each = [torch.stack([apart, hits.to(apart.dtype)])]
        total = cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        return torch.stack([total, hits.sum().to(total.dtype)])[:, None]

    def classes(self, targets: Tensor) -> list[Tensor]:
        return [targets]

    def head_flops(self, counts: Sequence[float]) -> float:
        return 2 * self.model.width * self.config.classes * counts[0]

    def expected_counts(self, samples: dict[str, int], run: RunConfig) -> list[float]:
        return [samples["images"]]
