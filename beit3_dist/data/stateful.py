"""The mixed stream for other trainers: a loader with `state_dict` and `load_state_dict`, in torchdata's convention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from beit3_dist.config import STREAMS
from beit3_dist.data.batch import MicroBatch, MixedBatches, Request, requests_from
from beit3_dist.data.joining import micro_batches
from beit3_dist.data.streaming import furthest


class StatefulLoader:
    """One rank's micro-batches, without end. The state is that of the last micro-batch handed out, whatever the loader
    processes have read ahead, and a loader with any number of processes goes on from it. After whole steps a loader of
    another number of ranks or micro-batches goes on from it as well."""

    def __init__(self, batches: MixedBatches, workers: int, prefetch: int, pin: bool) -> None:
        self.batches = batches
        self.settings = (workers, prefetch, pin)
        self.next = Request((0, 0, 0), 0)
        self.readers: list[list[int]] = []

    def __iter__(self) -> Iterator[MicroBatch]:
        batch = self.batches.config.batch
        first = self.next

        def requests() -> Iterator[Request]:
            found = requests_from(first.consumed, batch)
            for _ in range(first.micro):
                next(found)
            yield from found

        coming = requests()
        next(coming)
        self.batches.restore(self.readers, self.next != Request((0, 0, 0), 0))
        for item, following in zip(micro_batches(self.batches, requests(), *self.settings), coming, strict=False):
            self.next = following
            self.readers = furthest([*self.readers, *item.readers.tolist()])
            yield item

    def state_dict(self) -> dict[str, Any]:
        """Samples consumed per stream by all whole steps, the micro-batches since, and the layout these hold for;
        and where this rank's virtual readers stand: `furthest` of all ranks' is what another number of ranks needs."""
        consumed = dict(zip(STREAMS, self.next.consumed, strict=True))
        return consumed | {"micro": self.next.micro, "readers": self.readers} | self._layout()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state, from the next `iter` on. Raises ValueError for a state inside a step of another
        layout: which of the step's samples were consumed then has no answer here."""
        own = self._layout()
        if state["micro"] and any(state[name] != value for name, value in own.items()):
            raise ValueError(
                f"the state lies inside a step of {state['ranks']} data-parallel ranks and batch.accumulation="
                f"{state['accumulation']}; go on with the same, or save between steps"
            )
        self.next = Request((state["images"], state["texts"], state["pairs"]), state["micro"])
        self.readers = state["readers"]

    def _layout(self) -> dict[str, int]:
        return {"ranks": self.batches.world, "accumulation": self.batches.config.batch.accumulation}
