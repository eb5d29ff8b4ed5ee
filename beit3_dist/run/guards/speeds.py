"""Ranks that are slower than the others: every step takes as long as the slowest one.

Ranks wait for one another in collectives, so that the step's time says nothing of whose fault it is. Told apart are the
time for data, for forward and backward, which under ZeRO-1 and 2 nobody waits in, and that of products that have
nothing to do with the run, which tells a slow device in every layout.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist

from beit3_dist.gathering import gather_objects
from beit3_dist.parallel.collectives import all_gather
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.parallel.phases import PHASES, Phases, probe_s
from beit3_dist.run.folder import RunFolder

log = logging.getLogger(__name__)

FACTOR = 1.3
"""A rank is slow at what takes it so many times the ranks' median,"""
SHARE = 0.05
"""and so much of the step more than it."""
NAMED = 4
"""Slow ranks that the log names."""


class Speeds:
    """Gathers the times of all ranks every so many steps."""

    def __init__(self, every: int, mesh: Mesh, run: RunFolder) -> None:
        self._every, self._mesh, self._run = every, mesh, run

    def check(self, step: int, phases: Phases) -> None:
        """After a step. Collective where it is due."""
        if not self._every or step % self._every:
            return
        mine = torch.tensor([*phases.seconds(), probe_s(self._mesh.device)], device=self._mesh.device).double()
        assert dist.group.WORLD is not None
        rows = all_gather(mine[None], dist.group.WORLD).tolist()
        slow = slow_ranks(rows)
        hosts = gather_objects(socket.gethostname()) if slow else []
        if self._mesh.is_first:
            for rank, what in slow[:NAMED]:
                more = f", {len(slow) - NAMED} more are slow" if len(slow) > NAMED and (rank, what) == slow[0] else ""
                log.warning("step %d: rank %d on %s is slow: %s%s", step, rank, hosts[rank], what, more)
            self._run.times({"step": step, "slow_ranks": len({rank for rank, _ in slow}), **spread(rows)})


def spread(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of times [ranks, phases and probe]: the median and the slowest rank's of each."""
    found: dict[str, float] = {}
    for name, column in zip((*PHASES, "probe"), zip(*rows, strict=True), strict=True):
        found |= {f"{name}_s": median(column), f"{name}_slowest_s": max(column)}
    return found


def slow_ranks(rows: Sequence[Sequence[float]]) -> list[tuple[int, str]]:
    """(rank, what it is slow at), the slowest first, of times [ranks, phases and probe]."""
    data, forward, backward = (PHASES.index(name) for name in ("data", "forward", "backward"))
    step_s = median(sum(row[:-1]) for row in rows)
    columns = {
        "its device, in products that wait for nobody": ([row[-1] for row in rows], 0.0),
        "forward and backward": ([row[forward] + row[backward] for row in rows], SHARE * step_s),
        "data": ([row[data] for row in rows], SHARE * step_s),
    }
    found: list[tuple[float, int, str]] = []
    for name, (column, least) in columns.items():
        usual = median(column)
        found += [
            (
                taken / max(usual, 1e-9),
                rank,
                f"{name} take{'s' * (name == 'data')} {taken:.3g} s, the median {usual:.3g}",
            )
            for rank, taken in enumerate(column)
            if taken > FACTOR * usual and taken - usual > least
        ]
    return [(rank, what) for _, rank, what in sorted(found, reverse=True)]
