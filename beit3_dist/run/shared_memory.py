"""Whether /dev/shm has room for the images that loader processes hand over, found before a run starts.

A container's default is 64 MB. Where it is full a loader process dies of SIGBUS in the middle of the run.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from beit3_dist.config import LoadingConfig, require
from beit3_dist.parallel.mesh import Mesh

SHARED = Path("/dev/shm")
"""Where torch puts the tensors that it passes between processes."""
IN_USE = 2
"""Micro-batches beside those that are read ahead: one on its way, and the one that the trainer takes next."""


def image_bytes(*sides: int) -> int:
    """Bytes of square images of these sides."""
    return sum(3 * side**2 for side in sides)


def check_shared_memory(
    data: LoadingConfig,
    mesh: Mesh,
    micro_batch: int,
    accumulation: int = 1,
    validates: bool = False,
    reads: Callable[[Mesh], bool] = lambda _: True,
) -> None:
    """Raises ValueError, with the remedies, where the images that the loaders of this host may hold are more than
    /dev/shm has room for.

    micro_batch: bytes of the images of a process's micro-batch.
    validates: whether loaders of held-out samples are kept beside those of the training.
    reads: whether a process has loaders.
    """
    workers, prefetch = data.workers, data.prefetch
    if workers == 0 or not SHARED.is_dir():
        return
    first = mesh.rank - mesh.local_rank  # launchers number the processes of a host one after the other
    readers = sum(reads(replace(mesh, rank=first + number)) for number in range(mesh.local_world))
    need = readers * micro_batch * (workers * prefetch * (1 + validates) + accumulation + IN_USE)
    room = os.statvfs(SHARED)
    free = room.f_bavail * room.f_frsize
    require(
        need <= free,
        f"data.workers={workers}: the loaders of {readers} process(es) on {socket.gethostname()} may hold "
        f"{need / 1e6:,.1f} MB of images in {SHARED}, which has {free / 1e6:,.1f} MB free: enlarge it (a container: "
        f"--shm-size or --ipc=host), lower data.workers or data.prefetch={prefetch}, or set data.workers=0",
    )
