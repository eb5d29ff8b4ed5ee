"""Items that a thread takes ahead: the same ones in their order, errors where they belong, and an end. How loader
processes end."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator

import pytest
from torch.utils.data import Dataset

from beit3_dist.data.loader import TakenAhead, WorkerKilled, loader


def takers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_take" in thread.name}


def test_an_item_is_taken_while_the_one_before_is_in_use() -> None:
    taken = [threading.Event() for _ in range(4)]

    def source() -> Iterator[int]:
        for number in range(3):
            taken[number].set()
            yield number
        taken[3].set()

    items = iter(TakenAhead(source()))
    assert taken[0].wait(timeout=30), "the first one at once"
    for number in range(3):
        assert next(items) == number
        assert taken[number + 1].wait(timeout=30)
    assert next(items, None) is None


def test_an_error_comes_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield 0
        raise ValueError("item 1 is broken")

    items = iter(TakenAhead(source()))
    assert next(items) == 0
    with pytest.raises(ValueError, match="item 1 is broken"):
        next(items)
    assert next(items, None) is None


@pytest.mark.parametrize("used", [0, 1, 5])
def test_the_thread_ends_where_the_items_are_given_up(used: int) -> None:
    """An endless source: a run ends before its requests do, a validation before the loader says that it is done."""
    before = takers()
    source = iter(int, 1)
    items = iter(TakenAhead(source))
    for _ in range(used):
        assert next(items) == 0
    [thread] = takers() - before
    del items
    thread.join(timeout=30)
    assert not thread.is_alive()


class Slow(Dataset):
    def __getitem__(self, number: int) -> int:
        if number:
            time.sleep(60)
        return os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, "memory runs out"), (signal.SIGBUS, "/dev/shm is full")])
def test_a_loader_process_that_is_killed_is_told_as_that(number: signal.Signals, why: str) -> None:
    items = iter(loader(Slow(), range(9), 1, 2, pin=False))
    worker = next(items)
    os.kill(worker, number)
    words = f"^loader process {worker} was killed by {number.name}, as .*{why}"
    with pytest.raises(WorkerKilled, match=words) as error:
        next(items)
    traceback.clear_frames(error.tb)  # They hold the loader; the garbage collector would wait five seconds for it.
