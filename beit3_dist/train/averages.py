"""A moving average of the weights (Polyak and Juditsky 1992), kept in fp32 beside Adam's moments.

It lives in the optimizer's state under the key `ema`, one tensor for each tensor that the optimizer steps on, so it is
sharded, saved and resumed as the moments are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.parallel.fragments import AVERAGE, MOMENTS, fragments, inner_optimizer, refresh_parameters


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights after every step; it begins with the first step's weights."""

    def __init__(self, model: nn.Module, optimizer: Any, data_group: dist.ProcessGroup, decay: float) -> None:
        self._model, self._optimizer, self._data_group, self._decay = model, optimizer, data_group, decay

    def _masters(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """What the optimizer steps on, and its state; nothing before the first step."""
        state = inner_optimizer(self._optimizer).state
        masters = {id(fragment.flat): fragment.flat for fragment in fragments(self._model, self._optimizer)}
        for weights in masters.values():
            if MOMENTS[0] in state[weights]:
                yield weights, state[weights]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the step's new weights in."""
        for weights, state in self._masters():
            if AVERAGE in state:
                state[AVERAGE].lerp_(weights.detach().float(), 1 - self._decay)
            else:
                state[AVERAGE] = weights.detach().float().clone()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's weights are the average. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weights, state in self._masters():
            if AVERAGE in state:
                average = state[AVERAGE].clone()
                state[AVERAGE].copy_(weights)
                weights.data.copy_(average)
        held = list(fragments(self._model, self._optimizer))
        refresh_parameters(self._model, self._optimizer, held, self._data_group)
