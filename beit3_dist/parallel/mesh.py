"""The processes of a run and how they find one another.

The deepspeed launcher, torchrun and a plain `python` are told apart by the environment alone.
"""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mesh:
    """This process among the `world` processes. So far every one of them is a data-parallel rank."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0


def read_mesh() -> Mesh:
    """The mesh as the launcher describes it; one process where there is no launcher. Starts nothing."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    cuda = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Mesh(rank, world, local_rank, local_world, device)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def connect(mesh: Mesh) -> None:
    """Starts the process group (nccl on CUDA, gloo on the CPU) and claims the device."""
    defaults: dict[str, object] = {"RANK": mesh.rank, "WORLD_SIZE": mesh.world, "LOCAL_RANK": mesh.local_rank}
    if mesh.world == 1:
        defaults |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    if mesh.device.type == "cuda":
        torch.cuda.set_device(mesh.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // mesh.local_world))
    import deepspeed

    # DeepSpeed still calls collectives by names that torch renamed: a warning for every single call.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    if mesh.device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce with g++ for over a minute; gloo does without.
        # (The attribute deepspeed.comm.torch is torch itself; the module is found by its name only.)
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    deepspeed.init_distributed(dist_backend="nccl" if mesh.device.type == "cuda" else "gloo", verbose=False)
