"""What all processes of a run have to say, as objects."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_objects(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each process of a group (None: of the run) gives, rank by rank. Collective."""
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group=group)
    return everyones
