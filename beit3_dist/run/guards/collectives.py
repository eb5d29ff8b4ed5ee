"""Which collective a hanging run is in, and who has not come to it.

torch's flight recorder keeps the last collectives that this process has begun, group by group. A thread can read it
while the main thread hangs; where all processes have told what is last in theirs, the ones that are behind are known.
The recorder has no public interface yet (torch 2.13): where this torch has none, nothing is told.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch._C._distributed_c10d as recorder
import torch.distributed as dist

KEPT = 1000
"""Collectives that the recorder keeps."""
NAMED = 8
"""Ranks that a line names."""


@dataclass(frozen=True)
class Last:
    """The last collective that a process has begun in one group."""

    number: int
    """Counted from 1; the same in all members that have begun it."""
    name: str
    """all_reduce, broadcast, ..."""
    waits: bool
    """Whether it has not ended."""


@dataclass(frozen=True)
class Where:
    """What one process tells of itself."""

    host: str
    waits: bool
    """Whether it waits for another process, in a collective or for a message."""
    groups: Mapping[str, tuple[Sequence[int], Last]]
    """Name of a group -> its members' ranks, and the last collective in it."""

    def text(self) -> str:
        groups = {name: [list(members), asdict(last)] for name, (members, last) in self.groups.items()}
        return json.dumps({"host": self.host, "waits": self.waits, "groups": groups})

    @classmethod
    def of(cls, text: str) -> Where:
        told = json.loads(text)
        groups = {name: (members, Last(**last)) for name, (members, last) in told["groups"].items()}
        return cls(told["host"], told["waits"], groups)


def record_collectives() -> None:
    """Has torch record them; before the first process group."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(KEPT))


def where_am_i() -> Where:
    """Of this process, whichever of its threads asks."""
    groups = dist.distributed_c10d._world.pg_names
    members = {str(group.group_name): dist.get_process_group_ranks(group) for group in groups}
    return where_of(_recorded(), members)


def where_of(entries: Sequence[Mapping[str, Any]], members: Mapping[str, Sequence[int]]) -> Where:
    """`entries`: the recorder's, oldest first. `members`: ranks of the groups by name."""
    groups: dict[str, tuple[Sequence[int], Last]] = {}
    waits = False
    for entry in entries:
        (group, _), pending = entry["process_group"], not entry["retired"]
        waits |= pending
        if not entry["is_p2p"] and group in members:
            name = entry["profiling_name"].rpartition(":")[2]
            groups[group] = members[group], Last(entry["collective_seq_id"], name, pending)
    return Where(socket.gethostname(), waits, groups)


def _recorded() -> list[dict[str, Any]]:
    """The recorder's entries: NCCL's where there is a GPU, and gloo's."""
    dumps = (getattr(recorder, name, None) for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"))
    return [entry for dump in dumps if dump is not None for entry in json.loads(dump()).get("entries", [])]


def missing(told: Mapping[int, Where], world: int) -> list[str]:
    """Who keeps the others waiting, a line for each reason. `told`: by rank; who does not answer is not in it."""
    free = {rank for rank, where in told.items() if not where.waits}
    found: list[tuple[bool, str]] = []
    for group in sorted({name for where in told.values() for name in where.groups}):
        members, _ = next(where.groups[group] for where in told.values() if group in where.groups)
        last = {rank: told[rank].groups.get(group, (members, NONE))[1] for rank in members if rank in told}
        furthest = max(last.values(), key=lambda one: one.number)
        behind = [rank for rank, one in last.items() if one.number < furthest.number]
        waiting = [rank for rank, one in last.items() if one == furthest and one.waits]
        if behind and waiting:
            which = f"{furthest.name} {furthest.number} of {_named(members)}"
            wait = f"{_named(waiting)} wait{'s' * (len(waiting) == 1)}"
            line = f"{_hosts(behind, told)} not come to {which}, in which {wait}"
            found.append((not free.intersection(behind), line))
    lines = [line for _, line in sorted(found)]  # whoever waits for nobody first: the others wait because of it
    if free and not found and len(free) < len(told):
        lines = [f"{_hosts(sorted(free), told, ('waits', 'wait'))} for no other, while others wait"]
    silent = [rank for rank in range(world) if rank not in told]
    return lines + ([f"no answer from {_named(silent)}"] if silent else [])


NONE = Last(0, "", False)


def _named(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:NAMED]))
    return f"rank{'s' * (len(ranks) > 1)} {some}" + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")


def _hosts(ranks: Sequence[int], told: Mapping[int, Where], verb: tuple[str, str] = ("has", "have")) -> str:
    some = ", ".join(f"{rank} on {told[rank].host}" for rank in ranks[:NAMED])
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {some}{more} {verb[len(ranks) > 1]}"
