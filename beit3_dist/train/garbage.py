"""Python's search for unreachable objects, at chosen steps.

By itself it starts whenever enough objects were made: on each rank at another moment, and all others wait for that
one. What training makes is freed by its counts of references; the search finds little.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from typing import Self

EVERY = 500
"""Steps between two searches."""


class GarbageCollection(ExitStack):
    """No automatic search inside; what was there before is never searched."""

    def __enter__(self) -> Self:
        super().__enter__()
        gc.collect()
        gc.freeze()
        self.callback(gc.unfreeze)
        if gc.isenabled():
            gc.disable()
            self.callback(gc.enable)
        return self

    def after(self, step: int) -> None:
        """Searches where it is time to, on all ranks at the same step."""
        if step % EVERY == 0:
            gc.collect()
