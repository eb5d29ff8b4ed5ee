"""What the start of a run costs each rank: the code of the start itself, called for some ranks of up to 1,024."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from beit3_dist.checkpoint import find, read
from beit3_dist.checkpoint.files import as_json, write_text
from beit3_dist.checkpoint.fitting import shapes_of
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.snapshot import shard_header
from beit3_dist.checkpoint.store import FORMAT, INDEX_ENTRY, INDEX_OF, TrainState
from beit3_dist.checkpoint.tensor_index import INDEX, Held, chunk_digests, index_text, runs_of
from beit3_dist.command_line import to_yaml
from beit3_dist.config import BatchConfig, CheckpointConfig, RunConfig
from beit3_dist.looking import Looks, together
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.run.preflight import prepare_run
from tests.integration.runs import run_config
from tests.parallel.test_zero_shot import config_of
from tests.scale.counting import Costs, counting
from tests.unit.tar_fixtures import image_tar
from tests.unit.test_looking import Memory

NODE = 8
"""Processes of a node."""
WORLDS = (64, 1024)
PAGE = 4096
"""Bytes by which texts differ: names of folders, numbers with more digits."""


def mesh(rank: int, world: int) -> Mesh:
    return Mesh(rank, world, rank % NODE, NODE, torch.device("cpu"))


def pieces(shapes: dict[str, torch.Size], rank: int, world: int) -> Iterator[Shard]:
    """What a rank holds of the model and its moments under ZeRO-3."""
    for name, shape in shapes.items():
        part = -(-shape.numel() // world)
        start, stop = (min(place * part, shape.numel()) for place in (rank, rank + 1))
        if stop > start:
            values = torch.ones(stop - start)
            yield Shard(name, tuple(shape), start, {suffix: values for suffix in ("", "/exp_avg", "/exp_avg_sq")})


def checkpoint(config: RunConfig, world: int) -> Path:
    """A checkpoint of so many ranks in the folder of a run, as Store writes it, without syncing each file."""
    folder = Path(config.out, "checkpoints", "step_0000004")
    folder.mkdir(parents=True)
    entries: dict[str, dict[str, Any]] = {}

    def write(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    held, chunks, shapes = [], {}, shapes_of(config.model)
    for rank in range(world):
        shards = list(pieces(shapes, rank, world))
        held.append([Held(s.name, tuple(s.shape), s.start, s.numel, s.cut, tuple(s.tensors)) for s in shards])
        tensors = {shard.name + suffix: values for shard in shards for suffix, values in shard.tensors.items()}
        header = shard_header(shards, {name: values.numel() for name, values in tensors.items()})
        content = header + b"".join(values.numpy().tobytes() for values in tensors.values())
        write(name := f"shard_{rank:05d}.safetensors", content)
        chunks[name] = chunk_digests([content])
    state = TrainState(4, {"images": 16, "texts": 16, "pairs": 16})
    content_of_state = {"format": FORMAT, **asdict(state), "model": asdict(config.model), "versions": {}}
    write("state.json", as_json(content_of_state).encode())
    write("config.yaml", to_yaml(config).encode())
    write(INDEX, index_text(runs_of(enumerate(held)), chunks).encode())
    entries[INDEX_OF][INDEX_ENTRY] = entries.pop(INDEX)
    write_text(folder / "manifest.json", as_json(entries))
    return folder


class Start:
    """The start of a run in some of its processes, one after the other; what the first one gives the others is kept."""

    def __init__(self, config: RunConfig, world: int, folder: Path) -> None:
        self._config, self._world, self._folder = config, world, folder
        self._store, self._told = Memory(), {}

    def costs(self, rank: int) -> Costs:
        """What a rank does until its first step, but for what its device and the network need. The first process comes
        first, and that of a node before its fellows."""
        config, world, shapes = self._config, self._world, shapes_of(self._config.model)
        run = Looks(lambda: self._store, "run", rank == 0)
        node = Looks(lambda: self._store, f"node{rank // NODE}", rank % NODE == 0)
        with (
            counting(self._folder) as count,
            patch.object(find, "gather_objects", lambda mine: [mine]),
            patch.object(find, "scatter_objects", lambda everyones: self._tell("shares", everyones)[rank]),
            patch.object(read, "index_for_all", lambda path: self._tell("index", rank == 0 and read.read_index(path))),
            patch.multiple("torch.distributed", get_rank=lambda: rank, get_world_size=lambda: world),
        ):
            with together(run, node):
                ready = prepare_run(config, mesh(rank, world))
            if ready.checkpoint is not None:
                find.verified(ready.checkpoint, "auto", Path(config.out) / "checkpoints")
                read.load(ready.checkpoint, pieces(shapes, rank, world))
            elif rank == 0:  # the only replica that needs values, see Engine
                for name, shape in shapes.items():
                    ready.values(name, shape)
            return count.mark()

    def _tell(self, what: str, mine: Any) -> Any:
        """What the first process has said."""
        return self._told.setdefault(what, mine)


def run_of(folder: Path, world: int, shards: int = 16) -> RunConfig:
    """A run of two images a rank over so many shards."""
    (folder / "images").mkdir(exist_ok=True)
    for number in range(shards):
        if not (path := folder / "images" / f"{number:05d}.tar").exists():
            image_tar(path, 2, seed=2 * number)
    config = run_config(folder)
    return replace(
        config,
        out=str(folder / f"run{world}"),
        data=replace(config.data, images=f"{folder}/images/{{00000..{shards - 1:05d}}}.tar"),
        batch=replace(config.batch, images=2 * world, texts=2 * world, pairs=2 * world, accumulation=1),
        steps=12,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose index is made, and runs of which one rank count after the other has saved."""
    folder = tmp_path_factory.mktemp("start")
    Start(run_of(folder, WORLDS[0]), WORLDS[0], folder).costs(0)
    for world in WORLDS:
        checkpoint(run_of(folder, world), world)
    return folder


def case(goes_on: str, config: RunConfig) -> RunConfig:
    if goes_on == "resume":
        return replace(config, checkpoint=CheckpointConfig(resume="auto"))
    out = f"{config.out}-{goes_on}"
    return replace(config, out=out, init_from=config.out) if goes_on == "init_from" else replace(config, out=out)


@pytest.mark.parametrize("goes_on", ["anew", "resume", "init_from"])
def test_what_a_rank_does_at_the_start_does_not_grow_with_the_ranks(folder: Path, goes_on: str) -> None:
    found: dict[str, list[Costs]] = {"first": [], "second": [], "of a node": [], "last": []}
    for world in WORLDS:
        start = Start(case(goes_on, run_of(folder, world)), world, folder)
        ranks = {"first": 0, "second": 1, "of a node": NODE, "of the last node": world - NODE, "last": world - 1}
        for which, rank in ranks.items():
            costs = start.costs(rank)
            reads_tokenizer = rank % NODE == 0  # the first one, and one of each node, which compares its digest
            assert ("image_tokenizer.pth" in costs.opens) == reads_tokenizer
            print(f"{goes_on:9s} {world:5d} ranks, rank {rank:4d} {costs}")
            found.setdefault(which, []).append(costs)
    for which, (few, many) in found.items():
        growth = WORLDS[1] // WORLDS[0] if which == "first" else 1  # with the files of a checkpoint, one for each rank
        assert many.opened <= growth * few.opened, (which, few.opens, many.opens)
        assert many.looked <= growth * few.looked, (which, few.looks, many.looks)
        assert many.read <= growth * few.read + PAGE, which


def test_one_process_of_a_node_opens_what_a_run_is_scored_on(tmp_path: Path) -> None:
    config = replace(config_of(tmp_path, "run"), init_from="", batch=BatchConfig(images=0, texts=0, pairs=8))
    start, scored = Start(config, 8, tmp_path), {"pairs.tar", "classes.tar", "train.tar", "names.txt"}
    first, second = (set(start.costs(rank).opens) for rank in (0, 1))
    assert scored <= first and not scored & second


def test_the_first_rank_looks_twice_at_each_shard(folder: Path) -> None:
    Start(run_of(folder, 8, 64), 8, folder).costs(0)  # whose index is made
    few, many = (Start(run_of(folder, 8, shards), 8, folder) for shards in (16, 64))
    first = [start.costs(0) for start in (few, many)]
    assert first[1].looked - first[0].looked == 2 * 48 and first[1].opened == first[0].opened
    second = [start.costs(1) for start in (few, many)]
    assert second[1].looked == second[0].looked and second[1].opened == second[0].opened
