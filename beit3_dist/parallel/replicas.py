"""The replicas of the model, as losses see them that look at all samples of a step, wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.parallel.collectives import all_gather, gather


@dataclass(frozen=True)
class Replicas:
    """This replica among all. Each takes part in all that any of them asks for, with tensors of the same shapes."""

    group: dist.ProcessGroup | None = None
    """None: there is one replica."""

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """Which one this is."""
        return 0 if self.group is None else self.group.rank()

    def gather(self, mine: Tensor) -> Tensor:
        """Everyone's rows, replica by replica. Gradients flow back to where a row came from, summed over the replicas'
        losses, so that own losses, all candidates and a gradient averaged over the replicas are one process's."""
        return mine if self.group is None or self.size == 1 else gather(mine, self.group)

    def gather_constant(self, mine: Tensor) -> Tensor:
        """As `gather`, without a gradient."""
        return mine if self.group is None or self.size == 1 else all_gather(mine, self.group)

    def fetch(self, wanted: Tensor, held: int, give: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Rows from wherever they are: `wanted` int64 [k] counts them replica by replica, of which each has `held`.
        `give` makes them of this replica's own rows, int64 [m] on the host: tensors [m, ...]; without a gradient."""
        if self.group is None or self.size == 1:
            return give(wanted.cpu())
        asked = self.gather_constant(wanted[None]).cpu()  # [replicas, k]
        of_mine = [row[row // held == self.rank] - self.rank * held for row in asked]
        owners = asked[self.rank] // held
        coming, going = torch.bincount(owners, minlength=self.size).tolist(), [len(rows) for rows in of_mine]
        place = owners.argsort(stable=True).argsort().to(wanted.device)  # what comes is sorted by owner
        fetched = []
        for rows in give(torch.cat(of_mine)):
            received = rows.new_empty(len(wanted), *rows.shape[1:])
            dist.all_to_all_single(received, rows.contiguous(), coming, going, group=self.group)
            fetched.append(received[place])
        return fetched

    def pass_on(self, *mine: Tensor) -> list[Tensor]:
        """What the replica before this one, in a ring, passes on, without a gradient: tensors of the same shapes."""
        if self.group is None or self.size == 1:
            return list(mine)
        received = [torch.empty_like(tensor) for tensor in mine]
        after, before = ((self.rank + way) % self.size for way in (1, -1))
        after, before = (dist.get_global_rank(self.group, rank) for rank in (after, before))
        sends = [dist.P2POp(dist.isend, tensor.contiguous(), after, self.group) for tensor in mine]
        receipts = [dist.P2POp(dist.irecv, tensor, before, self.group) for tensor in received]
        for request in dist.batch_isend_irecv([*sends, *receipts]):
            request.wait()
        return received


ALONE = Replicas()
"""One process."""
