"""Loader processes: where they come from, and how they end."""

from __future__ import annotations

import atexit
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from multiprocessing import Pipe, forkserver
from multiprocessing.connection import Connection
from queue import Empty, Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from beit3_dist.children import end_with_parent
from beit3_dist.data import batch
from beit3_dist.data.faults import StreamFailed
from beit3_dist.leaving import SIGNALS
from beit3_dist.opening import open_files_allowed


def _start_worker(ending: Connection, _: int) -> None:
    """A loader process leaves signals to the trainer, which stops it in order, and uses one core. It ends when the
    trainer does, which closes its side of `ending`, or is gone. Torch's workers watch their parent, which is the fork
    server, and that lives as long as they do; and the trainer's end would wait for a worker that waits for a server."""
    for number in (signal.SIGINT, *SIGNALS):  # torch has just given the worker a handler of SIGTERM
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(ending)
    torch.set_num_threads(1)


@cache
def _trainers_end() -> Connection:
    """What tells the loader processes that this process ends: the other side of it is closed then."""
    ending, trainers_side = Pipe(duplex=False)
    atexit.register(trainers_side.close)
    return ending


class WorkerKilled(RuntimeError):
    """A signal has ended a loader process."""


WHY = {
    signal.SIGKILL: "as the system does where memory runs out: lower data.workers or data.prefetch, or give it more",
    signal.SIGBUS: "as where /dev/shm is full: enlarge it, or lower data.workers or data.prefetch",
}


class _Read:
    """The items of loader processes, which start at once, until one of them is a StreamFailed, which is raised here.
    Raises WorkerKilled where a process was."""

    def __init__(self, read: DataLoader) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Any]:
        return _items(iter(self._read))


def _items(read: Any) -> Iterator[Any]:
    try:
        for item in read:
            if isinstance(item, StreamFailed):
                raise item
            yield item
    except StreamFailed:
        raise
    except RuntimeError:
        for worker in read._workers:  # DataLoader says no more than that one "exited unexpectedly"
            if worker.exitcode is not None and worker.exitcode < 0:
                number = signal.Signals(-worker.exitcode)
                why = f", {WHY[number]}" if number in WHY else ""
                raise WorkerKilled(f"loader process {worker.pid} was killed by {number.name}{why}") from None
        raise


def _unchanged(item: object) -> object:
    """Collation: the items are batches already."""
    return item


class _ToldWhole(Dataset):
    """The same dataset, whose StreamFailed is an item: torch would bring it out of a loader process as the text of a
    traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, request: Any) -> Any:
        try:
            return self._dataset[request]
        except StreamFailed as failure:
            return failure


class TakenAhead:
    """The items of `source`, each taken by a thread while the one before it is in use; the first one at once. To take
    an item from a loader process is to shake hands with it over sockets, milliseconds where both have to wait for a
    core. Where memory is pinned, DataLoader has such a thread itself."""

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        return _Taken(self._source)


class _Taken:
    def __init__(self, source: Iterable[Any]) -> None:
        self._taken: Queue[tuple[Any, BaseException | None]] = Queue(maxsize=1)
        given_up = threading.Event()
        weakref.finalize(self, _give_up, self._taken, given_up).atexit = False
        threading.Thread(target=_take, args=(source, self._taken, given_up), daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item, end = self._taken.get()
        if end is not None:
            self._taken.put((None, StopIteration()))  # for whoever asks again
            raise end
        return item


def _take(source: Iterable[Any], taken: Queue[tuple[Any, BaseException | None]], given_up: threading.Event) -> None:
    try:
        for item in source:
            taken.put((item, None))
            if given_up.is_set():
                return
        taken.put((None, StopIteration()))
    except BaseException as error:  # for the thread that waits for the item
        taken.put((None, error))


def _give_up(taken: Queue[tuple[Any, BaseException | None]], given_up: threading.Event) -> None:
    given_up.set()
    with suppress(Empty):
        taken.get_nowait()  # makes room for what the thread may be holding


def loader(dataset: Dataset, requests: Iterable, workers: int, prefetch: int, pin: bool) -> Iterable[Any]:
    """Reads `requests` in order with `workers` processes, each `prefetch` micro-batches ahead; 0 reads in this process.

    Loader processes come from a fork server, not from the trainer: forking a process in which gloo, NCCL or OpenMP
    threads run copies their locks in whatever state they are, and the child may hang. The server is started clean,
    imports torch and what makes the batches once, and its children start in milliseconds where `spawn` needs seconds
    each. They open the tables by path, and get no file descriptors or index copies from the trainer. As always in
    Python, a script that calls this guards its entry by `if __name__ == "__main__"`.
    """
    # Its own generator: without one, DataLoader would draw a seed from torch's global one.
    load = partial(DataLoader, batch_size=None, sampler=requests, pin_memory=pin, generator=torch.Generator())
    if workers == 0:
        return load(dataset, collate_fn=_unchanged)
    # Each tensor on its way from a worker holds an open file, more than the usual limit of 1,024 allows. The
    # server and its workers, which open shards, inherit the limit.
    open_files_allowed()
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, batch.__name__])
    # The trainer turns these into a checkpoint. A scheduler sends them to every process of a job: the server and
    # the workers, which inherit what is ignored, must go on until the trainer ends.
    former = [(number, signal.signal(number, signal.SIG_IGN)) for number in SIGNALS]
    forkserver.ensure_running()
    for number, handler in former:
        signal.signal(number, handler)
    loading = load(
        _ToldWhole(dataset),
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=prefetch,
        worker_init_fn=partial(_start_worker, _trainers_end()),
        multiprocessing_context=context,
    )
    read = _Read(loading)
    return read if pin else TakenAhead(read)
