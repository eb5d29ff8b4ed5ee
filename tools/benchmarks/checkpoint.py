"""The `checkpoint` part of tools/benchmark.py: how long a save holds the training up, and how soon it is on the disk.

The tensors are weights and both moments of a recipe's model, in one process. A pause is compared with one copy of the
same tensors into host memory that is there already. Until it is durable, a save is compared with `torch.save`, followed
by the fsync that it leaves out, and with torch.distributed.checkpoint, which syncs its files by itself; ours takes the
SHA-256 of everything as well. The contenders take turns. Before that, what each has saved is loaded and compared.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.store import Store, TrainState, step_name
from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.optimizers.adamw import MOMENTS
from beit3_dist.recipe import read_sections
from beit3_dist.tools.benchmarks.measure import check_positive, gpu_or_cpu, in_turns, machine, spread
from beit3_dist.tools.benchmarks.recipe import RECIPES

SUFFIXES = ("", *(f"/{moment}" for moment in MOMENTS))
BYTES_PER_PARAMETER = 4 * len(SUFFIXES)


def shapes_of(model: ModelConfig) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in BEiT3(model, device="meta").named_parameters()}


def model_of(recipe: Path) -> ModelConfig:
    """The model of a recipe. Raises ValueError where there is none."""
    return ModelConfig(**read_sections(recipe, "model")["model"])


class Contenders:
    """The same tensors, saved in every way into a folder."""

    def __init__(self, model: ModelConfig, folder: Path, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model, self.folder, self.device = model, folder, device
        self.shapes = shapes_of(model)
        self.tensors: dict[str, Tensor] = {
            name + suffix: torch.randn(shape.numel(), generator=draw).to(device)
            for name, shape in self.shapes.items()
            for suffix in SUFFIXES
        }
        self.store = Store(folder / "ours", device, keep=1, keep_every=0, start=0)
        self.step = 0
        self._host = [torch.empty(t.shape, pin_memory=device.type == "cuda") for t in self.tensors.values()]

    def shards(self, tensors: dict[str, Tensor]) -> Iterator[Shard]:
        """As a rank hands them to the store."""
        for name, shape in self.shapes.items():
            yield Shard(name, tuple(shape), 0, {suffix: tensors[name + suffix] for suffix in SUFFIXES})

    def copy(self) -> None:
        """The least that a save can hold the training up: one copy to host memory."""
        for place, values in zip(self._host, self.tensors.values(), strict=True):
            place.copy_(values, non_blocking=True)

    def ours(self) -> float:
        """Saves durably; seconds that the training would have stood still."""
        self.step += 1
        started = time.perf_counter()
        self.store.save(self.shards(self.tensors), TrainState(step=self.step), self.model, "", {})
        pause = time.perf_counter() - started
        self.store.wait()
        return pause

    def torch_save(self) -> None:
        """`torch.save`, made durable."""
        with open(self.folder / "torch.pt", "wb") as file:
            torch.save(self.tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def distributed(self) -> None:
        """torch.distributed.checkpoint, whose writer syncs its files."""
        shutil.rmtree(self.folder / "dcp", ignore_errors=True)
        writer = dcp.FileSystemWriter(self.folder / "dcp", sync_files=True)
        dcp.save(self.tensors, storage_writer=writer, no_dist=True)

    def loaded(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        tensors = {name: torch.zeros_like(t) for name, t in self.tensors.items()}
        read.load(self.folder / "ours" / step_name(self.step), self.shards(tensors))
        yield "ours", tensors
        for values in tensors.values():
            values.zero_()
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(self.folder / "dcp"), no_dist=True)
        yield "torch.distributed.checkpoint", tensors
        yield "torch.save", torch.load(self.folder / "torch.pt", weights_only=True, map_location=self.device)

    def assert_equal_values(self) -> None:
        """Raises AssertionError unless every way gives every tensor back bit for bit."""
        for way, tensors in self.loaded():
            different = [name for name, values in self.tensors.items() if not torch.equal(tensors[name], values)]
            assert not different, f"{way} gives back other values of {', '.join(different[:3])}: nothing to compare"


def benchmark_checkpoint(options: Namespace) -> dict[str, Any]:
    device = gpu_or_cpu()
    model = model_of(options.recipe)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    folder = Path(tempfile.mkdtemp(prefix="beit3-benchmark-", dir=options.folder))
    try:
        contenders = Contenders(model, folder, device)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # dcp's, for every save in one process
        first_pause = contenders.ours()
        contenders.torch_save()
        contenders.distributed()
        contenders.assert_equal_values()
        pauses: list[float] = []
        ways = (  # the two that are short each after one that waited for the disk
            contenders.copy,
            contenders.torch_save,
            lambda: pauses.append(contenders.ours()),
            contenders.distributed,
        )
        copy_s, torch_s, ours_s, dcp_s = (taken.wall for taken in in_turns(ways, options.rounds, device))
        taken = {"copy": copy_s, "pause": pauses[1:], "ours": ours_s, "torch.save": torch_s, "dcp": dcp_s}
        size = sum(path.stat().st_size for path in (folder / "ours" / step_name(contenders.step)).iterdir())
    finally:
        shutil.rmtree(folder)
        dist.destroy_process_group()
    figures = {name: spread(values) for name, values in taken.items()}
    copy, pause, ours, torch_save, distributed = (figures[name]["median_s"] for name in taken)
    giant = BYTES_PER_PARAMETER * sum(shape.numel() for shape in shapes_of(ModelConfig()).values())
    return {
        "pause_ratio_vs_copy": pause / copy,
        "durable_ratio_vs_torch_save": torch_save / ours,
        "durable_ratio_vs_distributed_checkpoint": distributed / ours,
        "bytes": size,
        "first_pause_s": first_pause,
        "figures": figures,
        "copy_gb_per_s": size / copy / 1e9,
        "write_gb_per_s": size / (ours - pause) / 1e9,
        "giant": {"bytes": giant, "pause_s": giant / size * pause, "durable_s": giant / size * ours},
        "recipe": str(options.recipe),
        "folder": str(options.folder or tempfile.gettempdir()),
        "machine": machine(device),
    }


NAMES = {
    "copy": "one copy to host memory",
    "pause": "pause of the training, ours",
    "ours": "durable: ours",
    "torch.save": "durable: torch.save",
    "dcp": "durable: distributed.checkpoint",
}


def checkpoint_table(record: dict[str, Any]) -> str:
    machine, giant = record["machine"], record["giant"]
    lines = [
        f"{record['bytes'] / 1e6:.1f} MB, weights and moments of {record['recipe']}, written to {record['folder']}",
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; all give back equal values",
        "",
        f"{'seconds':34}{'median':>9}{'fastest':>9}{'slowest':>9}",
    ]
    for name, label in NAMES.items():
        it = record["figures"][name]
        lines.append(f"{label:34}{it['median_s']:9.4f}{it['fastest_s']:9.4f}{it['slowest_s']:9.4f}")
    ratios = [record[f"durable_ratio_vs_{name}"] for name in ("torch_save", "distributed_checkpoint")]
    lines += [
        "",
        f"pause / copy {record['pause_ratio_vs_copy']:.2f}; the first pause, in which memory is claimed, "
        f"{record['first_pause_s']:.4f} s",
        "time until durable over ours: torch.save {:.2f}, distributed.checkpoint {:.2f}".format(*ratios),
        f"copying {record['copy_gb_per_s']:.2f} GB/s; hashing and writing {record['write_gb_per_s']:.2f} GB/s",
        f"at these rates the giant's {giant['bytes'] / 1e9:.1f} GB: pause {giant['pause_s']:.1f} s, durable after "
        f"{giant['durable_s']:.0f} s, divided by the processes that have memory and a disk of their own",
    ]
    return "\n".join(lines)


def add_command(commands: Any) -> None:
    command = commands.add_parser("checkpoint", help="saving")
    command.set_defaults(measure=benchmark_checkpoint, table=checkpoint_table, check=check)
    command.add_argument("--recipe", type=Path, default=RECIPES / "demo.yaml", help="whose model is saved")
    command.add_argument("--folder", type=Path, help="where to write; the default is the system's temporary folder")
    command.add_argument("--rounds", type=int, default=15, help="rounds in which the contenders take turns")


def check(options: Namespace) -> None:
    check_positive(["rounds"], options)
    if options.folder is not None and not options.folder.is_dir():
        raise ValueError(f"--folder {options.folder} is no folder")
