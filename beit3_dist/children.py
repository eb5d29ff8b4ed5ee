"""How processes that multiprocessing has started end with the one that started them."""

from __future__ import annotations

import threading
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait

from beit3_dist.leaving import end


def end_with_parent(*told: Connection) -> None:
    """From here on this process ends, whatever it waits for, when its parent is gone, or has closed its end of one of
    `told`. For a pool's initializer: a worker whose parent was killed would wait for work for ever.
    """
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel, *told), daemon=True).start()


def _end_after(*ends: int | Connection) -> None:
    wait(ends)
    end(0)
