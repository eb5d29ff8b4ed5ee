"""What all processes of a run have to say, as objects."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_to_first(mine: Any) -> list[Any]:
    """What each process of the run gives, rank by rank, on the first one; nothing elsewhere. Collective."""
    everyones: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyones)
    return everyones or []


def scatter_objects(everyones: list[Any] | None) -> Any:
    """What the first process of the run has for this one; `everyones`: there, rank by rank. Collective."""
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, everyones)
    return mine[0]


def gather_objects(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each process of a group (None: of the run) gives, rank by rank. Collective."""
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    return everyones
