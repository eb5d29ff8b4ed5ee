"""Weights of which several processes hold a copy: where they are no longer equal, a device has made a mistake.

Memory and arithmetic units fail now and then without a sign (Dixit et al. 2021, "Silent data corruptions at scale").
What such a flip makes of one copy shows in a sum over the bits of its values, which costs one pass over the weights and
one reduction of a number for each parameter. A flip before the replicas' gradients are summed makes all copies wrong in
the same way, and at ZeRO 1 to 3 an element is stepped by one replica for all: neither shows here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.checkpoint.store import TrainState, checkpoints
from beit3_dist.gathering import gather_objects
from beit3_dist.parallel.collectives import all_agree, all_gather
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.endings import RunStopped
from beit3_dist.run.folder import of_all

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size of an element."""
NAMED = 3
"""Parameters that a stopped run names."""


@dataclass(frozen=True)
class Held:
    """Values of a parameter that this process holds."""

    name: str
    values: Tensor
    replicated: bool
    """The replicas of this part of the model hold the same ones."""
    uncut: bool
    """The tensor ranks of this replica hold the same ones."""


class EqualCopies:
    """Compares them every so many steps."""

    def __init__(self, every: int, groups: Groups, out: Path, step: int) -> None:
        """`step`: the run goes on behind it."""
        self._every, self._groups, self._checkpoints, self._equal = every, groups, out / "checkpoints", step

    def is_due(self, step: int) -> bool:
        return bool(self._every) and step % self._every == 0

    def check(self, state: TrainState, held: Iterable[Held]) -> None:
        """Raises RunStopped, on all ranks, where copies differ. Collective."""
        mine, mesh = list(held), self._groups.mesh
        found: list[str] = []
        for group, alike in (
            (self._groups.data, [one for one in mine if one.replicated]),
            (self._groups.tensor, [one for one in mine if one.uncut]),
        ):
            if group.size() > 1 and alike:
                found += differing(alike, group)
        if all_agree(not found, mesh.device):
            self._equal = state.step
            return
        raise RunStopped(self._message(state.step, list(dict.fromkeys(of_all(found, None)))))

    def _message(self, step: int, lines: Sequence[str]) -> str:
        good = [path for number, path in checkpoints(self._checkpoints).items() if number <= self._equal]
        go_on = f"go on from {good[-1]} by --checkpoint.resume" if good else "start anew"
        more = f" and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        return (
            f"guards.compare_every={self._every}: after step {step} copies of weights are no longer equal: "
            f"{'; '.join(lines[:NAMED])}{more}. A device has made a mistake that nobody noticed: leave its host out; "
            f"all copies were equal after step {self._equal}: {go_on}"
        )


def digest(values: Tensor) -> Tensor:
    """int64 []: the sum, modulo 2^64, of the values' bits as integers. One flipped bit always changes it."""
    return values.detach().contiguous().view(-1).view(BITS[values.element_size()]).sum(dtype=torch.int64)


def differing(held: Sequence[Held], group: dist.ProcessGroup) -> list[str]:
    """A line for each parameter whose copies in the group differ; the same on all its ranks. Collective."""
    mine = torch.stack([digest(one.values) for one in held])  # [P]
    both = torch.cat([mine, ~mine])  # the largest of the complements is the complement of the smallest
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    largest, smallest = both[: len(held)], ~both[len(held) :]
    odd = (largest != smallest).nonzero().flatten().tolist()
    if not odd:
        return []
    hosts, digests = gather_objects(socket.gethostname(), group), all_gather(mine[None], group)
    ranks = dist.get_process_group_ranks(group)
    lines = []
    for index in odd:
        values = digests[:, index].tolist()
        usual = max(values, key=values.count)
        # With two copies, or two camps of one size, nobody knows which is right.
        known = values.count(usual) > len(values) / 2
        wrong = [f"rank {rank} on {host}" for rank, host, value in zip(ranks, hosts, values, strict=True)
                 if value != usual or not known]  # fmt: skip
        lines.append(f"{held[index].name} on {', '.join(wrong) if known else ' or '.join(wrong)}")
    return lines
