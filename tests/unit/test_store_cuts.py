"""A checkpoint loads however it was cut and however it is to be cut, in memory that does not depend on its size."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.snapshot import Snapshot
from beit3_dist.model.cut import Cut

SHAPES = {
    "rows": ((7, 3), 0),
    "columns": ((5, 7), 1),
    "vector": ((10,), 0),
    "whole": ((4, 3), None),
    "deep": ((3, 5, 2), 1),
}
"""Name -> shape, and the dimension that tensor ranks cut."""


def values(name: str) -> torch.Tensor:
    shape, _ = SHAPES[name]
    return 100.0 * (1 + list(SHAPES).index(name)) + torch.arange(math.prod(shape)).view(shape)


def pieces(tensor: int, data: int) -> list[list[Shard]]:
    """What each of `tensor` x `data` ranks holds: parts of the tensor ranks, each flattened and cut by ZeRO."""
    ranks = []
    for part, replica in itertools.product(range(tensor), range(data)):
        held = []
        for name, (shape, dimension) in SHAPES.items():
            cut = None if dimension is None or tensor == 1 else Cut(dimension, part, tensor)
            mine = (cut.of(values(name)) if cut else values(name)).reshape(-1)
            size = -(-len(mine) // data)
            start, stop = min(replica * size, len(mine)), min((replica + 1) * size, len(mine))
            held.append(Shard(name, shape, start, {"": mine[start:stop].clone()}, cut))
        ranks.append(held)
    return ranks


def save(folder: Path, tensor: int, data: int) -> None:
    """The shards alone."""
    folder.mkdir()
    snapshot = Snapshot(torch.device("cpu"))
    for rank, held in enumerate(pieces(tensor, data)):
        snapshot.take(p for p in held if p.cut is not None or rank < data)  # what is not cut, once
        snapshot.write(folder / f"shard_{rank:05d}.safetensors")


LAYOUTS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 1)]


@pytest.mark.parametrize("buffer", [1, 9, read.BUFFER])
@pytest.mark.parametrize("saved", LAYOUTS)
def test_any_layout_loads_in_any_other(
    saved: tuple[int, int], buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what the ranks of the other layout cut for themselves, the padding's zeros included."""
    monkeypatch.setattr(read, "BUFFER", buffer)
    save(tmp_path / "saved", *saved)
    shards = read.StoredShards(tmp_path / "saved")
    for layout in LAYOUTS:
        for rank, held in enumerate(pieces(*layout)):
            for piece in held:
                target = torch.full_like(piece.tensors[""], torch.nan)
                shards.fill(target, piece, "")
                assert torch.equal(target, piece.tensors[""]), f"{piece.name} on rank {rank} of {layout}"
    assert all(torch.equal(shards.whole(name, ""), values(name)) for name in SHAPES)


@pytest.mark.parametrize("missing", ["rows", "columns"])
def test_a_missing_part_is_noticed_in_another_layout(missing: str, tmp_path: Path) -> None:
    save(tmp_path / "saved", 2, 2)
    (tmp_path / "saved" / "shard_00003.safetensors").unlink()
    shards = read.StoredShards(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"holds .* elements of {missing}"):
        shards.whole(missing, "")


LIMITED = """
import resource, sys
import torch
from pathlib import Path
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.model.cut import Cut
from beit3_dist.checkpoint.read import load

folder, budget, cut = Path(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3])
torch.set_num_threads(1)
shape = (1 << 12, 1 << 12)
target = torch.zeros(cut.shape(shape) if cut else shape).view(-1)
held = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + budget, held + budget))
load(folder, [Shard("big", shape, 0, {"": target}, cut)])
print(float(target[-1]))
"""


@pytest.mark.slow
def test_loading_holds_no_parameter_in_memory(tmp_path: Path) -> None:
    """A 64 MiB parameter of two tensor ranks, in one piece and in four, within buffers of 16 MiB; beside the targets
    nothing of the parameter's size. The kernel refuses more memory than the limit."""
    whole = torch.arange(1 << 24, dtype=torch.float32).view(1 << 12, 1 << 12)
    snapshot = Snapshot(torch.device("cpu"))
    for part in range(2):
        cut = Cut(1, part, 2)
        mine = cut.of(whole).reshape(-1)
        snapshot.take([Shard("big", tuple(whole.shape), 0, {"": mine}, cut)])
        snapshot.write(tmp_path / f"shard_{part:05d}.safetensors")

    def loads(budget: int, cut: Cut | None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, str(tmp_path), str(budget), repr(cut)]
        # Large blocks go back to the kernel when they are freed; glibc may otherwise keep them, and all counts.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)

    parameter = whole.nbytes
    for cut in (None, Cut(1, 3, 4), Cut(1, 0, 2)):
        done = loads(parameter, cut)  # the target is there already: together under twice the largest parameter
        assert done.returncode == 0, done.stderr
        expected = whole if cut is None else cut.of(whole)
        assert float(done.stdout) == float(expected.reshape(-1)[-1])
    assert loads(read.BUFFER // 2, None).returncode != 0, "the limit limits nothing"
