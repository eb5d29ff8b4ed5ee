"""The members of a tar, joined by key as samples: what an index holds and what a check of shards reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from beit3_dist.data.kinds import LeftOut, hidden, key_and_kind, leave_out, why_not
from beit3_dist.data.tars import DamagedTar, Tar

Places = list[tuple[int, int]]
"""Offset and size of the member of each kind, size -1 where there is none."""


@dataclass
class Members:
    samples: dict[bytes, Places] = field(default_factory=dict)
    """Key, the member's path without its known extension -> its members."""
    count: int = 0
    seconds: list[tuple[bytes, int]] = field(default_factory=list)
    """Key and kind of members whose key has one of that kind already."""
    torn: dict[bytes, None] = field(default_factory=dict)
    """Keys between whose members others lie: webdataset tears them apart."""
    left_out: LeftOut = field(default_factory=dict)
    """Members that somebody may miss."""
    ignored: LeftOut = field(default_factory=dict)
    """Members that nobody misses: hidden ones, and others beside those that make up a sample."""
    damage: str = ""
    """What is wrong with the tar; empty if nothing."""


def members_of(tar: Tar) -> Members:
    """Reads all headers. Raises ValueError where the file is no plain tar."""
    found = Members()
    others: list[tuple[bytes, bytes]] = []
    before = None
    try:
        for name, offset, size, odd in tar:
            found.count += 1
            key, kind = key_and_kind(name)
            if kind is None:
                others.append((key, name))
                continue
            if odd:
                leave_out(found.left_out, odd, _text(name))
                continue
            places = found.samples.get(key)
            if places is None:
                places = found.samples[key] = [(0, -1)] * 4
            elif places[kind][1] >= 0:
                found.seconds.append((key, kind))
                continue
            elif before != key:
                found.torn[key] = None
            places[kind] = offset, size
            before = key
    except DamagedTar as error:
        found.damage = str(error)
    for key, name in others:
        of_a_sample = hidden(name) or key in found.samples
        leave_out(found.ignored if of_a_sample else found.left_out, why_not(name), _text(name))
    return found


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
