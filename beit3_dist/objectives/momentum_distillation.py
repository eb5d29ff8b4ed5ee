"""Momentum distillation: a moving average of the model itself is the teacher (ALBEF, Li et al. 2021, 3.2).

It has no losses of its own: contrastive, masked_data_modeling and prefix_language_modeling, where they meet it, mix
their targets with what the average of the weights says before the step (the last as mPLUG does, Li et al. 2022, whose
released code, though, takes the average's softmax over the places of a text in place of its words).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beit3_dist.config import RunConfig, require, require_not_negative, require_within
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import SeenImages
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import Objective, Places
from beit3_dist.objectives.soft_targets import Taught

NAME = "momentum_distillation"
SECTION = f"objectives.{NAME}"


@dataclass(kw_only=True)
class MomentumDistillationConfig:
    """Soft targets of a moving average of the weights, for contrastive's pairs and for the words of
    masked_data_modeling and prefix_language_modeling, whichever the run has. The defaults are ALBEF's. The average
    takes 4 bytes a parameter, sharded as the optimizer's state. Before every step it stands in the weights' place for
    one more forward pass, for which below ZeRO-3 the replicas gather first it and then the weights; its logits of the
    words stay until their micro-batch has been learnt."""

    decay: float = 0.995
    """average <- decay * average + (1 - decay) * weights after every step; it begins with the initial weights."""
    alpha: float = 0.4
    """Share of a target that is the average's; the rest is the truth's. Validation has the truth alone."""
    ramp_steps: int = 0
    """Steps over which alpha grows from 0: those of the first epoch in ALBEF, of the first two in BLIP."""
    queue: int = 65_536
    """Pairs before the step's own, seen by the average of their time, that contrastive tells a pair from, too."""

    def __post_init__(self) -> None:
        require_within("(0, 1)", f"{SECTION}.", self, "decay")
        require_within("[0, 1]", f"{SECTION}.", self, "alpha")
        require_not_negative(f"{SECTION}.", self, "ramp_steps", "queue")


class MomentumDistillation(Objective):
    """What the others ask about the teacher."""

    name = NAME
    Config = MomentumDistillationConfig

    def __init__(self, config: MomentumDistillationConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        self.losses, self.views, self.average_decay = [], [], config.decay
        pipeline = run.parallel.pipeline
        require(
            pipeline == 1,
            f"{SECTION}: the moving average makes a pass before every step, which parallel.pipeline={pipeline} cannot: "
            "use parallel.pipeline=1",
        )
        masking = run.gradient_masking.every
        require(masking == 0, f"{SECTION}: gradient_masking.every={masking} has passes of its own: use one of the two")

    def meet(self, others: Mapping[str, Objective]) -> None:
        require(
            any(other.looks_back for other in others.values()),
            f"{SECTION} teaches contrastive's pairs and masked or next words, and the run has none of them",
        )

    def alpha(self, step: int) -> float:
        """The average's share of the targets of a step."""
        ramp = self.config.ramp_steps
        return self.config.alpha * (min(1.0, step / ramp) if ramp else 1.0)

    def taught(self, logits: list[Tensor], step: int) -> list[Taught]:
        """What it says of words of each micro-batch, from its logits of them."""
        return [(of_words, self.alpha(step)) for of_words in logits]

    def counts(self, batch: MicroBatch) -> list[int]:
        return []

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> None:
        """There are none."""

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Any) -> Tensor:
        return hidden_MD.new_zeros(2, 0, dtype=torch.float32)
