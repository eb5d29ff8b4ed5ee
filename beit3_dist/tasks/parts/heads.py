"""BEiT-3 with the head of a downstream task, and the heads that tasks share.

The heads and their names below `task_head.` are those of unilm's released fine-tuned models, so that its checkpoints
fit. What a task does not use is left out: the head for visual codes always, the head for words and the decoder where
there is another head, the final norm where that begins with one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from beit3_dist.checkpoint.model_folder import TASK_HEAD
from beit3_dist.config import ModelConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.model.initialization import initial_value, materialize, named_generator
from beit3_dist.model.token_layout import TokenLayout

SMALL = 1e-3
"""Factor of a classifier's matrices, so that fine-tuning starts from even predictions (BEiT; unilm)."""


class TaskHead(nn.Module):
    """What a task puts on top of the encoder's hidden states."""

    begins_with_norm: ClassVar[bool] = False
    """Whether it has a norm in place of the model's final one."""
    small: ClassVar[tuple[str, ...]] = ()
    """Names of the matrices that start `SMALL` times as large as those of pretraining."""
    deviations: Mapping[str, float] = {}
    """Names of the matrices that start from a normal of this deviation."""
    constants: Mapping[str, float] = {}
    """Names of the parameters that start from a number."""
    bounds: Mapping[str, tuple[float, float]] = {}
    """Names of the parameters that every step leaves in an interval."""


class ClassHead(TaskHead):
    """Mean of the patches (CLS left out) -> LayerNorm -> classes. Patches [B, 1 + P, D] -> logits [B, classes]."""

    begins_with_norm = True
    small = ("head.weight",)

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.fc_norm = LayerNorm(width)
        self.head = Linear(width, classes)

    def forward(self, patches_BND: Tensor) -> Tensor:
        return self.head(self.fc_norm(patches_BND[:, 1:].mean(1)))


class TokenPooler(nn.Module):
    """LayerNorm, matrix and tanh of the first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.dense = Linear(width, width)

    def forward(self, hidden_BND: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(hidden_BND[:, 0])))


class PooledHead(TaskHead):
    """The pooled first token -> two matrices with LayerNorm and GELU between. Hidden [B, N, D] -> [B, classes]."""

    begins_with_norm = True

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.pooler = TokenPooler(width)
        self.head = nn.Sequential(Linear(width, 2 * width), LayerNorm(2 * width), nn.GELU(), Linear(2 * width, classes))

    def forward(self, hidden_BND: Tensor) -> Tensor:
        return self.head(self.pooler(hidden_BND))


class NoNorm(nn.Module):
    """Stands where a task leaves out the final norm."""

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        return x_TD


class FineTuned(BEiT3):
    """BEiT-3 with one task's head `task_head`, or without one (None) and with the head for words. Built like BEiT3:
    `device="meta"` takes no memory, else values are a function of (seed, name)."""

    def __init__(
        self, config: ModelConfig, head: TaskHead | None, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(config, device="meta")
        del self.image_head
        if head is not None:
            del self.text_head
            if config.decoder_layers:
                del self.decoder
            self.task_head = head
            if head.begins_with_norm:
                self.norm: nn.Module = NoNorm()  # type: ignore[assignment]
        if torch.device(device).type != "meta":
            materialize(self, lambda name, shape: self.first_value(name, shape, seed), device)

    def first_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The initial value of a parameter: that of pretraining, unless the head says otherwise."""
        in_head = name.removeprefix(TASK_HEAD)
        if in_head != name:
            if in_head in self.task_head.constants:
                return torch.full(shape, self.task_head.constants[in_head])
            if in_head in self.task_head.deviations:
                drawn = torch.randn(shape, generator=named_generator(seed, name))
                return drawn * self.task_head.deviations[in_head]
            if len(shape) == 1 and name.endswith("weight"):
                return torch.ones(shape)  # of a LayerNorm
        if in_head != name and len(shape) == 4:  # of a convolution (He et al. 2015)
            value = torch.randn(shape, generator=named_generator(seed, name)) * (2 / prod(shape[1:])) ** 0.5
        else:
            value = initial_value(name, shape, self.config, seed)
        return value * SMALL if in_head != name and in_head in self.task_head.small else value
