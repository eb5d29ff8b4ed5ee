"""Gradient masking in a run: passes stream by stream, updates of the masks, their place in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.views import Codes
from beit3_dist.objectives.registry import objectives_by_stream
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.fragments import Fragment
from beit3_dist.parallel.gradient_masks import GradientMasks
from beit3_dist.parallel.replicas import Replicas
from beit3_dist.run.checkpointing import More
from beit3_dist.run.preflight import Ready
from beit3_dist.train.feed import StepBatch
from beit3_dist.train.passes import passes_by_stream


class MaskedByStream:
    """The masks of a run and what uses them."""

    def __init__(self, config: RunConfig, ready: Ready, engine: Engine) -> None:
        self._settings, self._engine, groups = config.gradient_masking, engine, engine.groups
        made = objectives_by_stream(config, ("texts", "images"))
        self._by_stream = {stream: one.connected(Replicas(groups.data)) for stream, one in made.items()}
        for objectives in self._by_stream.values():
            objectives.multiple = ready.objectives.multiple
            for objective in objectives:
                objective.use_teachers(ready.teachers[objective.name], engine.mesh.device, groups.tensor)
        self.masks = GradientMasks(engine.model, engine.optimizer, groups, engine.cuts, engine.zero_stage)

    def passes(self, batch: StepBatch, codes_of: Callable[[MicroBatch], Codes | None]) -> Iterator[tuple[Any, ...]]:
        """See `passes_by_stream`."""
        return passes_by_stream(self._by_stream, self._engine, batch, codes_of, self._begins)

    def _begins(self, stream: str) -> None:
        self.masks.takes_text = stream == "texts"

    def after(self, steps: int) -> None:
        """After so many steps of the run. Collective."""
        if steps % self._settings.every == 0:
            self.masks.tighten(self._settings.share_after(steps))

    @contextmanager
    def restored(self) -> Iterator[More]:
        """Inside, what `load_checkpoint` is to read of the masks; behind it they are what was read. Collective."""
        read: dict[str, Tensor] = {}

        def more(fragment: Fragment) -> dict[str, Tensor]:
            tensors = self.masks.of_fragment(fragment)
            if tensors:
                (read[fragment.name],) = tensors.values()
            return tensors

        yield more
        self.masks.restore(read)
