"""The processes of a run and how they find one another.

The deepspeed launcher, torchrun, srun (see slurm.py) and a plain `python` are told apart by the environment alone.
"""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.devices import device_type
from beit3_dist.launched import read_place
from beit3_dist.parallel.host_memory import keep_freed_memory
from beit3_dist.parallel.meeting import PATIENCE, meet


@dataclass(frozen=True)
class Mesh:
    """This process among `world = pipeline x data x tensor` processes.

    rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank: tensor ranks, which talk most, are neighbours;
    pipeline stages, which talk least, lie furthest apart.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    tensor: int = 1
    """Ranks that share every layer."""
    pipeline: int = 1
    """Stages that the layers are cut into."""

    @property
    def data(self) -> int:
        """Replicas of the model, each with its own micro-batches."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def tensor_rank(self) -> int:
        """This process's part of every layer."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """This process's replica."""
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """This process's stage."""
        return self.rank // (self.tensor * self.data)

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the heads, and so needs the targets."""
        return self.pipeline_rank == self.pipeline - 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0


def read_mesh(tensor: int = 1, pipeline: int = 1) -> Mesh:
    """The mesh as the launcher describes it; one process where there is no launcher. Starts nothing.

    Raises ValueError where tensor x pipeline ranks do not divide the launcher's processes, where the environment
    describes no place among them, and where this process has no device.
    """
    place, kind = read_place(), device_type()
    if place.world % (tensor * pipeline):
        raise ValueError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline} does not divide the {place.world} started "
            "processes"
        )
    if kind == "cpu":
        device = torch.device("cpu")
    else:
        # `srun --gpus-per-task=1` shows every process a single device, of another number than its place on the node.
        index = 0 if torch.cuda.device_count() == 1 else place.local_rank
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {place.local_rank} of this host has no GPU of its own: there are "
                f"{torch.cuda.device_count()} for {place.local_world} processes; start fewer, or show them more by "
                "CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", index)
    return Mesh(place.rank, place.world, place.local_rank, place.local_world, device, tensor, pipeline)


class Groups:
    """The process groups of a mesh, and the interface by which DeepSpeed asks for them ("mpu")."""

    def __init__(self, mesh: Mesh, patience: timedelta) -> None:
        """After torch's process group of all; `patience`: how long a collective waits for the ranks that it lacks."""
        self.mesh, self._patience = mesh, patience
        assert dist.group.WORLD is not None
        self._made = {tuple(range(mesh.world)): dist.group.WORLD}
        ranks = torch.arange(mesh.world).view(mesh.pipeline, mesh.data, mesh.tensor)
        self.tensor = self._mine(ranks.flatten(0, 1))
        self.tensor_hosts = self.tensor
        """The same processes by way of host memory, for what the device has no part in."""
        if mesh.tensor > 1 and mesh.device.type != "cpu":
            members = dist.get_process_group_ranks(self.tensor)
            self.tensor_hosts = dist.new_group(
                members, timeout=patience, backend="gloo", use_local_synchronization=True
            )
        self.data = self._mine(ranks.transpose(1, 2).flatten(0, 1))
        self.pipeline = self._mine(ranks.flatten(1).T)
        # All parts of one replica: DeepSpeed sums the gradient norm over it and agrees on overflow in it.
        self.model = self._mine(ranks.transpose(0, 1).flatten(1))

    def _mine(self, lists: Tensor) -> dist.ProcessGroup:
        """Of the groups [groups, members], which all processes share out among them, the one that this process is in.

        All processes make their own groups at the same time. For NCCL, whose processes are bound to their devices, that
        is one ncclCommSplit of the world's communicator for all groups together. (Where every process makes every
        group, as new_group wants it by default, each of them is one: 769 at the start of 256 processes that are
        replicas, since tensor and pipeline groups have one member each.) Equal groups are one.
        """
        members = next(tuple(group) for group in lists.tolist() if self.mesh.rank in group)
        if members not in self._made:
            self._made[members] = dist.new_group(list(members), timeout=self._patience, use_local_synchronization=True)
        return self._made[members]

    def sum_over_data(self, values: Tensor) -> None:
        """Sums `values` in place over the replicas."""
        dist.all_reduce(values, group=self.data)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.data

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.pipeline * self.mesh.tensor

    def get_model_parallel_rank(self) -> int:
        return self.mesh.pipeline_rank * self.mesh.tensor + self.mesh.tensor_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.mesh.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self.mesh.tensor_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.mesh.pipeline


def connect(mesh: Mesh, patience: timedelta = PATIENCE) -> Groups:
    """Starts the process groups (nccl on CUDA, gloo on the CPU) and claims the device.

    `patience`: how long a collective waits for the ranks that it lacks. Raises NotMet where the processes do not find
    one another.
    """
    place = {"RANK": mesh.rank, "WORLD_SIZE": mesh.world, "LOCAL_RANK": mesh.local_rank}  # DeepSpeed reads them
    os.environ.update({name: str(value) for name, value in place.items()})
    if mesh.device.type == "cuda":
        torch.cuda.set_device(mesh.device)
        os.environ["LOCAL_RANK"] = str(mesh.device.index)  # DeepSpeed takes it for the device's number
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // mesh.local_world))
    import deepspeed

    # DeepSpeed still calls collectives by names that torch renamed: a warning for every single call.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    if mesh.device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce with g++ for over a minute; gloo does without.
        # (The attribute deepspeed.comm.torch is torch itself; the module is found by its name only.)
        setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    cuda = mesh.device.type == "cuda"
    meet("nccl" if cuda else "gloo", mesh.rank, mesh.world, mesh.device if cuda else None)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    # Not as the meeting's timeout, with which the processes would wait as long for one that never starts.
    dist.distributed_c10d._set_pg_timeout(patience)
    return Groups(mesh, patience)
