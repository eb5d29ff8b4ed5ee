"""Python's garbage collection, on all ranks after the same steps.

By itself it starts whenever enough objects have been made: on each rank at another moment, for which all others wait.
What training makes is freed by reference counts, so that there is little to collect.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from typing import Self

EVERY = 500
"""Steps between two collections."""


class GarbageCollection(ExitStack):
    """Inside, no automatic collection; objects that were there before are never searched.

    Nor afterwards, where a program has frozen its imports: DeepSpeed collects several times while it makes an engine,
    and the next run of the process would search them all each time. What a run has left among them is found once the
    program calls `gc.unfreeze`.
    """

    def __enter__(self) -> Self:
        super().__enter__()
        held = gc.get_freeze_count()
        gc.collect()
        gc.freeze()
        if not held:
            self.callback(gc.unfreeze)
        if gc.isenabled():
            gc.disable()
            self.callback(gc.enable)
        return self

    def after(self, step: int) -> None:
        """Collects after every EVERY-th step."""
        if step % EVERY == 0:
            gc.collect()
