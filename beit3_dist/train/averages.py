"""A moving average of the weights (Polyak and Juditsky 1992) in fp32, sharded, saved and resumed like the moments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from beit3_dist.checkpoint.read import AVERAGE
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.fragments import Fragment, fragments, refresh_parameters


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights after every step; it begins with the first step's weights, or
    with those of `begin`. `suffix`: of its names in checkpoints."""

    def __init__(self, engine: Engine, decay: float, suffix: str = AVERAGE) -> None:
        self._engine, self._decay, self._suffix = engine, decay, suffix
        self._averages: dict[Tensor, Tensor] = {}
        """Master weights, as the optimizer steps on them -> their average."""

    def _masters(self) -> set[Tensor]:
        return {fragment.flat for fragment in fragments(self._engine.model, self._engine.optimizer)}

    @torch.no_grad()
    def begin(self) -> None:
        """Begins with the weights as they are."""
        for weights in self._masters():
            self._begin(weights)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the step's new weights in."""
        for weights in self._masters():
            if weights in self._averages:
                self._averages[weights].lerp_(weights.detach().float(), 1 - self._decay)
            else:
                self._begin(weights)

    def of_fragment(self, fragment: Fragment) -> dict[str, Tensor]:
        """What a checkpoint holds of the average: suffix of the parameter's name -> view of this rank's elements."""
        if fragment.flat not in self._averages:  # every step so far was skipped, or it will be read from a checkpoint
            self._begin(fragment.flat)
        return {self._suffix: fragment.slice_of(self._averages[fragment.flat])}

    def _begin(self, weights: Tensor) -> None:
        self._averages[weights] = weights.detach().to(torch.float32, copy=True)

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
        engine = self._engine
        for weights, average in self._averages.items():
            former = weights.detach().clone()
            weights.data.copy_(average)
            average.copy_(former)
        held = list(fragments(engine.model, engine.optimizer))
        refresh_parameters(engine.model, engine.optimizer, held, engine.groups.data)
