"""Ways to damage a file of a checkpoint, and what a run says to each."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from beit3_dist.checkpoint.find import Damaged, find, verified
from beit3_dist.checkpoint.store import checkpoints


def resume(what: str, folder: Path) -> Path | None:
    """As a run does: before the process groups, and after."""
    return verified(find(what, folder), what, folder)


def flip(path: Path, place: int) -> None:
    """Flips a byte's lowest bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: os.truncate(path, 0),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n}"),
    "first byte flipped": lambda path: flip(path, 0),
    "byte flipped": lambda path: flip(path, path.stat().st_size // 2),
    "last byte flipped": lambda path: flip(path, path.stat().st_size - 1),
}


def _overwritten(content: bytes, place: int, new: bytes) -> bytes:
    return (content[:place] + new + content[place + len(new) :])[: len(content)]


RANDOM_DAMAGES: dict[str, Callable[[bytes, bytes, random.Random], bytes | None]] = {
    "deleted": lambda content, other, rng: None,
    "cut": lambda content, other, rng: content[: rng.randrange(len(content))],
    "longer": lambda content, other, rng: content + rng.randbytes(rng.randint(1, 64)),
    "a bit flipped": lambda content, other, rng: _overwritten(
        content, place := rng.randrange(len(content)), bytes([content[place] ^ 1 << rng.randrange(8)])
    ),
    "bytes overwritten": lambda content, other, rng: _overwritten(
        content, rng.randrange(len(content)), rng.randbytes(rng.randint(1, 64))
    ),
    "a block of zeros": lambda content, other, rng: _overwritten(content, rng.randrange(len(content)), bytes(512)),
    "bytes missing": lambda content, other, rng: content[: (cut := rng.randrange(len(content)))] + content[cut + 7 :],
    "of another checkpoint": lambda content, other, rng: other,
}
"""(content, the same file's in the checkpoint before, draws) -> what becomes of the file; None: it is gone."""


@dataclass
class Refusals:
    """What a run said to the damages of its newest checkpoint."""

    refused: Counter[str] = field(default_factory=Counter)
    """Kind of damage -> how many were refused in one line with the name of the file, and `auto` took the one before."""
    missed: list[str] = field(default_factory=list)
    """The others, with what was said instead."""


def damage_at_random(folder: Path, count: int, seed: int = 0) -> Refusals:
    """Damages a file of the newest checkpoint in `folder` so often, and puts it right again. Wants a process group."""
    rng, result = random.Random(seed), Refusals()
    *_, older, newest = checkpoints(folder).values()
    kinds = list(RANDOM_DAMAGES)
    while sum(result.refused.values()) + len(result.missed) < count:
        name, kind = rng.choice(sorted(path.name for path in newest.iterdir())), rng.choice(kinds)
        file, before = newest / name, (older / name).read_bytes()
        content = file.read_bytes()
        changed = RANDOM_DAMAGES[kind](content, before, rng)
        if changed == content:
            continue
        file.unlink() if changed is None else file.write_bytes(changed)
        try:
            said = f"goes on from {resume(str(newest), folder)}"
        except Damaged as refusal:
            said = str(refusal)
        if name in said and "\n" not in said and resume("auto", folder) == older:
            result.refused[kind] += 1
        else:
            result.missed.append(f"{name}, {kind}: {said}")
        file.write_bytes(content)
    assert resume("auto", folder) == newest, "a checkpoint that was put right again is not taken"
    return result
