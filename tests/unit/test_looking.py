"""One process opens files, the others receive what it has seen; where it fails, they know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from beit3_dist import looking
from beit3_dist.looking import Looks, ToldElsewhere, of_node, of_run, pack, together, unpack


class Memory:
    """A store in this process, as torch's has its methods."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.changed = Event()

    def set(self, key: str, value: bytes | str, /) -> None:
        self.content[key] = value if isinstance(value, bytes) else value.encode()
        self.changed.set()

    def get(self, key: str, /) -> bytes:
        return self.content[key]

    def add(self, key: str, value: int, /) -> int:
        self.content[key] = str(int(self.content.get(key, b"0")) + value).encode()
        return int(self.content[key])

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        while not all(key in self.content for key in keys):
            assert self.changed.wait(10), f"nobody tells of {keys}"
            self.changed.clear()


def as_process(store: Memory, rank: int, node: int, body: Callable[[], Any]) -> Any:
    """What `body` gives, or the error that it raises, in a process of a run of nodes with two each."""
    try:
        with together(Looks(lambda: store, "run", rank == 0), Looks(lambda: store, f"node{node}", rank % 2 == 0)):
            return body()
    except (ValueError, ToldElsewhere) as error:
        return error


def everywhere(body: Callable[[int], Any]) -> list[Any]:
    """`body(rank)` in four processes of two nodes; the one that looks comes last, so that the others have waited."""
    store, results = Memory(), {}
    store.changed = Event()
    threads = [
        Thread(target=lambda rank=rank: results.update({rank: as_process(store, rank, rank // 2, lambda: body(rank))}))
        for rank in (0, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[0], as_process(store, 1, 0, lambda: body(1)), results[2], as_process(store, 3, 1, lambda: body(3))]


def test_one_process_looks_for_the_run_and_one_for_each_node() -> None:
    asked: list[tuple[str, int]] = []

    def look(what: str, rank: int) -> list[Any]:
        asked.append((what, rank))
        return [what, rank]

    def body(rank: int) -> list[Any]:
        return [of_run(lambda: look("run", rank)), of_node(lambda: look("node", rank)), of_run(lambda: rank)]

    assert everywhere(body) == [[["run", 0], ["node", node], 0] for node in (0, 0, 2, 2)]
    assert sorted(asked) == [("node", 0), ("node", 2), ("run", 0)]


def test_who_looks_asks_nobody_on_the_way() -> None:
    assert everywhere(lambda rank: of_run(lambda: of_node(lambda: rank))) == [0] * 4


def test_a_mistake_of_the_one_that_looks_ends_the_others() -> None:
    def body(rank: int) -> None:
        of_run(lambda: 1)
        of_node(lambda: int("no number" if rank == 2 else "5"))
        of_node(lambda: 1)

    first, second, third, fourth = everywhere(body)
    assert first is None and second is None, "the other node has not met the mistake"
    assert isinstance(third, ValueError) and isinstance(fourth, ToldElsewhere)


def test_an_error_between_two_looks_is_told_as_well() -> None:
    def body(rank: int) -> int:
        of_run(lambda: 1)
        if rank == 0:
            raise ValueError("found without looking")
        return of_run(lambda: 2)

    first, *others = everywhere(body)
    assert isinstance(first, ValueError) and all(isinstance(other, ToldElsewhere) for other in others)


def test_outside_everyone_looks_for_itself() -> None:
    assert of_run(lambda: object) is object and of_node(lambda: object) is object


@pytest.mark.parametrize(
    "seen",
    [None, 3, "", "a\udcff/ü", b"", bytes(range(256)), {"a": [1, {"b": b"x"}], "c": 2.5, "d": True}],
    ids=str,
)
def test_plain_values_come_as_they_were(seen: Any) -> None:
    assert unpack(pack(seen)) == seen and pack(seen)


def test_much_is_told_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "CHUNK", 10)
    numbers = [number * 7919 % 1009 for number in range(1000)]
    assert everywhere(lambda rank: of_run(lambda: numbers)) == [numbers] * 4


def process(kind: str) -> None:
    """One of two processes on this machine: looks together with the other, then meets it in a process group."""
    import torch
    import torch.distributed as dist

    from beit3_dist.launched import take_place
    from beit3_dist.parallel.meeting import looks_of_all, meet

    place = take_place()
    seen: list[Any] = []
    try:
        with together(*looks_of_all(place)):
            seen.append(of_run(lambda: {"rank": place.rank, "much": "x" * 20_000_000}))
            seen.append(of_node(lambda: place.rank))
            if kind == "mistake":
                of_run(lambda: int("no number"))
        meet("gloo", place.rank, place.world, None)
        with together(*looks_of_all(place)):  # as the stages of a run do
            seen.append(of_run(lambda: place.rank))
        ranks = torch.tensor([place.rank])
        dist.all_reduce(ranks)
        ending = f"the ranks add up to {ranks.item()}"
        dist.barrier()
    except (ValueError, ToldElsewhere) as error:
        ending = type(error).__name__
    told = [s | {"much": len(s["much"])} if isinstance(s, dict) else s for s in seen]
    print(json.dumps([told, ending]), flush=True)
    os._exit(0)


@pytest.mark.parametrize("kind", ["all is well", "mistake"])
def test_by_way_of_the_store_at_which_they_meet(kind: str) -> None:
    from tests.parallel.workers import free_port

    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.test_looking", kind],
            cwd=Path(__file__).parents[2],
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank},
            text=True,
            stdout=subprocess.PIPE,
        )
        for rank in "01"
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    seen = [{"rank": 0, "much": 20_000_000}, 0]
    if kind == "mistake":
        assert first == [seen, "ValueError"] and second == [seen, "ToldElsewhere"]
    else:
        assert first == second == [[*seen, 0], "the ranks add up to 1"]


if __name__ == "__main__":
    process(sys.argv[1])
