"""Whether /dev/shm has room for the images that loader processes hand over, found before a run starts.

A container's default is 64 MB. Where it is full a loader process dies of SIGBUS in the middle of the run.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

from beit3_dist.config import RunConfig, require
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.tasks.registry import task_class

SHARED = Path("/dev/shm")
"""Where torch puts the tensors that it passes between processes."""
IN_USE = 2
"""Micro-batches beside those that are read ahead: one on its way, and the one that the trainer takes next."""


def check_shared_memory(config: RunConfig | FinetuneConfig | TokenizerConfig, mesh: Mesh, view: int = 0) -> None:
    """Raises ValueError, with the remedies, where the images that the loaders of this host may hold are more than
    /dev/shm has room for. `view`: side of the image tokenizer's views, where pretraining has some of their own."""
    workers, prefetch = config.data.workers, config.data.prefetch
    if workers == 0 or not SHARED.is_dir():
        return
    if isinstance(config, RunConfig):
        # Where each process reads a part of every micro-batch, as streams without random access want it, it is less.
        images, _, pairs = config.micro_batch(mesh.data)
        size, steps = (images + pairs) * 3 * (config.model.image_size**2 + view**2), config.accumulation
        readers = sum(_reads(replace(mesh, rank=rank)) for rank in _ranks_of_this_host(mesh))
        validates = config.eval.every > 0
    elif isinstance(config, FinetuneConfig):
        size = config.micro_batch(mesh.data)[0] * task_class(config.task).images * 3 * config.model.image_size**2
        steps, readers, validates = config.accumulation, mesh.local_world, bool(config.data.validation)
    else:
        size, steps = config.batch // mesh.world * 3 * config.model.image_size**2, 1
        readers, validates = mesh.local_world, False
    ahead = workers * prefetch
    need = readers * size * (ahead * (1 + validates) + steps + IN_USE)
    room = os.statvfs(SHARED)
    free = room.f_bavail * room.f_frsize
    require(
        need <= free,
        f"data.workers={workers}: the loaders of {readers} process(es) on {socket.gethostname()} may hold "
        f"{need / 1e6:,.1f} MB of pictures in {SHARED}, which has {free / 1e6:,.1f} MB free: enlarge it (a container: "
        f"--shm-size or --ipc=host), lower data.workers or data.prefetch={prefetch}, or set data.workers=0",
    )


def _ranks_of_this_host(mesh: Mesh) -> range:
    """Launchers number the processes of a host one after the other."""
    first = mesh.rank - mesh.local_rank
    return range(first, first + mesh.local_world)


def _reads(mesh: Mesh) -> bool:
    """Whether a process of pretraining has loader processes; see `feed.Feed`."""
    return mesh.tensor_rank == 0 and mesh.pipeline_rank in (0, mesh.pipeline - 1)
