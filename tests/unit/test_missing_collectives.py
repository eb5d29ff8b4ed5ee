"""Who keeps a hanging run waiting, from what torch's flight recorder has."""

from __future__ import annotations

import socket
from typing import Any

from beit3_dist.run.guards.collectives import Where, missing, where_of

MEMBERS = {"0": [0, 1, 2, 3], "tensor": [0, 1], "other tensor": [2, 3]}


def entry(group: str, number: int, ended: bool = True, name: str = "all_reduce", p2p: bool = False) -> dict[str, Any]:
    """As the recorder writes it."""
    return {
        "process_group": [group, "undefined"], "collective_seq_id": number, "profiling_name": f"gloo:{name}",
        "is_p2p": p2p, "retired": ended,
    }  # fmt: skip


def told(*of_rank: list[dict[str, Any]]) -> dict[int, Where]:
    return {rank: Where.of(where_of(entries, MEMBERS).text()) for rank, entries in enumerate(of_rank)}


def on_host(ranks: str) -> str:
    """`2, 3`, with the host of each."""
    return ", ".join(f"{rank} on {socket.gethostname()}" for rank in ranks.split(", "))


def test_the_rank_that_has_not_come() -> None:
    waits = [entry("0", 6), entry("0", 7, ended=False)]
    (line,) = missing(told(waits, waits, [entry("0", 6)], waits), 4)
    assert line == f"rank {on_host('2')} has not come to all_reduce 7 of ranks 0, 1, 2, 3, in which ranks 0, 1, 3 wait"


def test_whoever_waits_for_nobody_comes_first() -> None:
    """Rank 3 hangs; rank 2 waits for it in their group, and the others for both."""
    waits = [entry("0", 7, ended=False)]
    two = [entry("0", 6), entry("other tensor", 40, ended=False, name="broadcast")]
    first, second = missing(told(waits, waits, two, [entry("0", 6), entry("other tensor", 39)]), 4)
    assert first == f"rank {on_host('3')} has not come to broadcast 40 of ranks 2, 3, in which rank 2 waits"
    assert second.startswith(f"ranks {on_host('2, 3')} have not come to all_reduce 7 of ranks 0, 1, 2, 3")


def test_a_group_that_a_rank_has_never_used() -> None:
    (line,) = missing(told([entry("tensor", 1, ended=False)], [], [], []), 4)
    assert line == f"rank {on_host('1')} has not come to all_reduce 1 of ranks 0, 1, in which rank 0 waits"


def test_messages_have_no_number_but_who_waits_for_nobody_is_known() -> None:
    waits = [entry("0", 3), entry("0", 9, ended=False, name="recv", p2p=True)]
    (line,) = missing(told(waits, [entry("0", 3)], waits, waits), 4)
    assert line == f"rank {on_host('1')} waits for no other, while others wait"


def test_who_does_not_answer() -> None:
    where = told([entry("0", 7, ended=False)], [entry("0", 7, ended=False)])
    assert missing(where, 4) == ["no answer from ranks 2, 3"]
    assert missing(told([], [], [], []), 4) == []


def test_of_many_ranks_some_are_named() -> None:
    everyone = {"0": list(range(40))}
    where = {rank: where_of([entry("0", 2 - (rank > 9), ended=rank > 9)], everyone) for rank in range(40)}
    (line,) = missing(where, 40)
    assert "and 22 more have not come to" in line and line.endswith(
        "in which ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more wait"
    )
