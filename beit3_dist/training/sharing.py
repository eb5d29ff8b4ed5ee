"""One tensor rank reads and decodes; its neighbours, which work on the same samples, get them from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist

from beit3_dist.data.batch import MicroBatch
from beit3_dist.parallel.mesh import Groups


def shared(groups: Groups, read: Callable[[], Iterator[MicroBatch]]) -> Iterator[MicroBatch]:
    """The micro-batches of `read()`, which is called on the first of the tensor ranks alone."""
    reader = read() if groups.mesh.tensor_rank == 0 else None
    if groups.mesh.tensor == 1 and reader is not None:
        yield from reader
    while True:
        yield broadcast(groups, None if reader is None else next(reader))


def broadcast(groups: Groups, batch: MicroBatch | None) -> MicroBatch:
    """The first tensor rank's micro-batch on all of them, on the host."""
    device, group = groups.mesh.device, groups.tensor
    source = dist.get_global_rank(group, 0)
    names = [f.name for f in fields(MicroBatch) if f.name != "faults"]
    header: list[Any] = [None, None]
    if batch is not None:
        tensors = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
        header = [
            [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()],
            batch.faults,
        ]
    dist.broadcast_object_list(header, src=source, group=group, device=device)
    layout = [(name, shape, getattr(torch, dtype)) for name, shape, dtype in header[0]]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in layout]
    if batch is None:
        content = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    else:
        content = torch.cat([tensors[name].flatten().view(torch.uint8) for name, _, _ in layout]).to(device)
    dist.broadcast(content, src=source, group=group)
    if batch is not None:
        return batch
    parts = content.cpu().split(sizes)
    received: dict[str, Any] = {"tokenizer_images": None, "faults": header[1]}
    for (name, shape, dtype), part in zip(layout, parts, strict=True):
        received[name] = part.clone().view(dtype).view(shape)
    return MicroBatch(**received)
