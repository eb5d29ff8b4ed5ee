"""What a downstream task has to define, and the objective that trains any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.data.text import TextTokenizer
from beit3_dist.model.drop_path import drop_path_factors
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.tasks.examples import Example
from beit3_dist.tasks.heads import FineTuned

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and deviation of the channels that pretraining normalises by."""


class Normalization:
    """Pictures uint8 [..., 3, S, S] on a device -> fp32: (x / 255 - mean) / deviation, channel by channel."""

    def __init__(self, statistics: tuple[tuple[float, ...], tuple[float, ...]], device: torch.device) -> None:
        self._mean, self._deviation = (torch.tensor(v, device=device).view(3, 1, 1) for v in statistics)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self._mean) / self._deviation


@dataclass(frozen=True)
class TaskInputs:
    """A micro-batch of B examples on the device."""

    images: Tensor
    """[B, k, 3, S, S], normalised; k pictures an example."""
    words: Tensor
    """int64 [B, L]."""
    padding: Tensor
    """bool [B, L], on the host: layouts are made there."""
    labels: Tensor
    """The task's own: classes int64 [B], scores float [B, answers], ..."""
    keys: Tensor
    """int64 [B]: what each sample draws its drop path by."""
    targets: Tensor | None = None
    """captioning: int64 [B, L], the words to recover, -1 elsewhere."""
    step: int = 0
    """Steps of training before this one."""
    keep: Callable[[Tensor], Tensor | None] = lambda keys: None
    """keys int64 [S] -> drop-path factors [layers, 2, S]; None in evaluation."""


class Task(ABC):
    """A downstream use: its head, loss, predictions and metric. One file each."""

    statistics: tuple[tuple[float, ...], tuple[float, ...]] = HALF
    """Mean and deviation that pictures are normalised by."""
    metric: str
    """The metric that says how good a model is."""

    def __init__(self, config: FinetuneConfig, tokenizer: TextTokenizer, classes: Sequence[str] = ()) -> None:
        """`classes`: names of what the head tells apart, where the task has classes."""
        self.config, self.tokenizer, self.classes = config, tokenizer, list(classes)
        self._group: dist.ProcessGroup | None = None

    def connect(self, data_group: dist.ProcessGroup) -> None:
        """Learns the group of the replicas, for losses that look at all their examples."""
        self._group = data_group

    def mask(self, words: Tensor, padding: Tensor, keys: list[int]) -> tuple[Tensor, Tensor | None]:
        """What the model reads of a training batch's words [B, L], and what it has to recover. On the host; `keys`: of
        what each sample draws."""
        return words, None

    def build(self, device: str = "meta") -> FineTuned:
        """The model with the task's head."""
        return FineTuned(self.config.model, self.config.task, len(self.classes), device=device)

    def describe(self) -> dict[str, Any]:
        """What a model folder remembers of the head."""
        return {
            "name": self.config.task,
            "classes": len(self.classes),
            "answers": self.classes,
            "text_length": self.config.data.text_length,
        }

    @abstractmethod
    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """[2, M]: losses, and how right each prediction is in [0, 1]; M = B, or the words of captions."""

    @abstractmethod
    def predict(self, model: FineTuned, inputs: TaskInputs, agree: Callable[[bool], bool]) -> Tensor:
        """[B, ...]: what `score` needs, of one shape for all batches. `agree`: a reduction over all ranks, for
        predictions in as many steps as it takes."""

    @abstractmethod
    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        """The metrics of all predictions [N, ...], on the CPU, in the examples' order. Examples without a truth (an
        index for a test server) do not count; none where no example has one."""

    @abstractmethod
    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        """Writes them into a folder in the benchmark's submission format."""


class TaskObjective(nn.Module):
    """A model under a task's loss: the mean over the step's examples (captioning: masked words), in any layout."""

    def __init__(self, model: FineTuned, task: Task, seed: int) -> None:
        super().__init__()
        self.model, self._task, self._seed = model, task, seed

    def forward(
        self,
        inputs: TaskInputs,
        step_counts: Tensor | None = None,
        step: int = 0,
        predict: Callable[[bool], bool] | None = None,
    ) -> Any:
        """The micro-batch's contribution to the step's loss, and the statistics [2, 1]: sums of losses and of right
        predictions. `step_counts` [1]: what the sum is divided by. With `predict`, the task's predictions."""
        if predict is not None:
            return self._task.predict(self.model, inputs, predict)
        assert step_counts is not None
        config = self.model.config
        inputs = replace(inputs, step=step)
        if self.training and config.drop_path > 0:

            def factors(ids: Tensor) -> Tensor:
                return drop_path_factors(ids, seed=self._seed, step=step, layers=config.layers, rate=config.drop_path)

            inputs = replace(inputs, keep=factors)
        sums = self._task.losses(self.model, inputs).sum(1)
        return sums[0] / step_counts[0].clamp(min=1), sums.detach()[:, None]


def shares(logits: Tensor, labels: Tensor) -> Tensor:
    """float [B]: 1 where the largest logit is the label's."""
    return (logits.argmax(-1) == labels).float()


def cross_entropies(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """[2, B] of logits [B, classes] and classes int64 [B] (or probabilities [B, classes]), in fp32."""
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    return torch.stack([losses, shares(logits, labels if labels.ndim == 1 else labels.argmax(-1))])
