"""Checkpoints are whole or absent, and load however they were cut."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from beit3_dist.checkpoint import store
from beit3_dist.checkpoint.store import Piece, TrainState, damaged, find, read_state, read_weights
from beit3_dist.config import ModelConfig
from beit3_dist.parallel.mesh import Groups
from tests.parallel.workers import run_workers

MODEL = ModelConfig(layers=2, width=8, heads=2, ffn_width=12, vl_expert_layers=1)
STATE = TrainState(step=7, consumed=(70, 14, 21), bad_samples=3)
SHAPES = {"a.weight": (3, 5), "a.bias": (5,), "single": (1,)}
SUFFIXES = ("", "/exp_avg", "/exp_avg_sq")


def whole(name: str, suffix: str) -> torch.Tensor:
    """The value of a tensor, flattened."""
    first = 100 * list(SHAPES).index(name) + 1000 * SUFFIXES.index(suffix)
    return torch.arange(first, first + torch.Size(SHAPES[name]).numel(), dtype=torch.float32)


def pieces(rank: int, world: int, empty: bool = False) -> list[Piece]:
    """What a rank holds when everything is cut into equal parts, the last one shorter or without anything, as ZeRO
    does; `empty`: with zeros in place of the values."""
    held = []
    for name, shape in SHAPES.items():
        total = torch.Size(shape).numel()
        part = -(-total // world)
        start, end = min(rank * part, total), min((rank + 1) * part, total)
        tensors = {suffix: whole(name, suffix)[start:end].clone() for suffix in SUFFIXES}
        if empty:
            tensors = {suffix: torch.zeros_like(value) for suffix, value in tensors.items()}
        held.append(Piece(name, shape, start, tensors))
    return held


def save(folder: Path, step: int = 7, rank: int = 0, world: int = 1, keep: int = 0) -> Path:
    state = replace(STATE, step=step)
    return store.save(folder, pieces(rank, world), state, MODEL, "out: x\n", {"torch": "1"}, keep)


def load(path: Path, rank: int = 0, world: int = 1) -> None:
    """Loads into zeros and compares with the values."""
    target = pieces(rank, world, empty=True)
    store.load(path, target)
    for piece, expected in zip(target, pieces(rank, world), strict=True):
        for suffix in SUFFIXES:
            assert torch.equal(piece.tensors[suffix], expected.tensors[suffix]), piece.name + suffix


@pytest.fixture(autouse=True)
def one_process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "group"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints")


def save_in_worker(groups: Groups, folder: str) -> None:
    save(Path(folder), rank=groups.mesh.rank, world=groups.mesh.world)


def load_in_worker(groups: Groups, path: str) -> None:
    load(Path(path), groups.mesh.rank, groups.mesh.world)


def refusal_in_worker(groups: Groups, path: str) -> str:
    try:
        load(Path(path), groups.mesh.rank, groups.mesh.world)
    except ValueError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------------------------- contents


def test_what_is_saved_is_loaded(checkpoint: Path) -> None:
    assert checkpoint.name == "step_0000007"
    assert (checkpoint.parent / "latest").read_text() == "step_0000007\n"
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "shard_00000.safetensors",
        "state.json",
    ]
    assert damaged(checkpoint) == ""
    assert read_state(checkpoint, MODEL) == STATE
    load(checkpoint)


def test_weights_alone(checkpoint: Path) -> None:
    weights = read_weights(checkpoint)
    assert {name: tuple(value.shape) for name, value in weights.items()} == SHAPES
    assert all(torch.equal(value.flatten(), whole(name, "")) for name, value in weights.items())


def test_other_cuts_hold_the_same(tmp_path: Path) -> None:
    """2 ranks -> 1, and what one saved -> 2 and 3, of which some hold nothing of a small tensor."""
    run_workers(2, save_in_worker, str(tmp_path / "two"))
    two = tmp_path / "two" / "step_0000007"
    assert len(list(two.glob("shard_*"))) == 2
    load(two)
    assert all(torch.equal(value.flatten(), whole(name, "")) for name, value in read_weights(two).items())
    one = save(tmp_path / "one")
    run_workers(2, load_in_worker, str(one))
    for rank in range(3):
        load(two, rank, 3)


def test_the_target_may_be_strided(checkpoint: Path) -> None:
    """Moments are views into flat buffers."""
    target = pieces(0, 1, empty=True)[0]
    buffer = torch.zeros(40)
    target.tensors = {"": buffer.narrow(0, 11, 15)}
    store.load(checkpoint, [target])
    assert torch.equal(buffer[11:26], whole("a.weight", ""))
    assert not buffer[:11].any() and not buffer[26:].any()


def test_advancing_counts_samples() -> None:
    state = TrainState()
    for replaced in (0, 2):
        state.advance((6, 4, 2), replaced)
    assert state == TrainState(step=2, consumed=(12, 8, 4), bad_samples=2)


# ------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "state.json", "config.yaml", "manifest.json"])
def test_a_missing_file_is_named(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint\.resume: .*{name}"):
        find(str(checkpoint), checkpoint.parent)


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "state.json", "config.yaml"])
def test_a_truncated_file_is_named(name: str, checkpoint: Path) -> None:
    size = (checkpoint / name).stat().st_size
    os.truncate(checkpoint / name, size - 1)
    with pytest.raises(ValueError, match=rf"{name} has {size - 1} bytes, its manifest says {size}"):
        find(str(checkpoint), checkpoint.parent)


def test_a_truncated_manifest_is_damage(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    os.truncate(manifest, manifest.stat().st_size // 2)
    assert str(checkpoint) in damaged(checkpoint)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.resume: .*nowhere is no whole checkpoint"):
        find(str(tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.999])
def test_a_flipped_byte_is_found(place: float, checkpoint: Path) -> None:
    shard = checkpoint / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[int(place * len(content))] ^= 1
    shard.write_bytes(content)
    assert damaged(checkpoint) == "", "a size does not tell"
    with pytest.raises(ValueError, match=r"shard_00000\.safetensors: the SHA-256 is not the manifest's"):
        load(checkpoint)


def test_every_rank_refuses_what_one_finds(tmp_path: Path) -> None:
    """One rank that raises alone would leave the others in a collective for ever."""
    run_workers(2, save_in_worker, str(tmp_path))
    path = tmp_path / "step_0000007"
    shard = path / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x77")
    refusals = run_workers(2, refusal_in_worker, str(path))
    assert refusals[0] == refusals[1] and "shard_00001.safetensors" in refusals[0]


def test_missing_elements_are_counted(tmp_path: Path) -> None:
    """One of two ranks' shards alone, with a manifest that fits it."""
    path = save(tmp_path, rank=0, world=2)
    with pytest.raises(ValueError, match=r"holds 8 of 15 elements of a\.weight"):
        load(path)


def test_another_shape_is_refused(checkpoint: Path) -> None:
    other = Piece("a.weight", (5, 3), 0, {"": torch.zeros(15)})
    with pytest.raises(ValueError, match=r"a\.weight has shape \[3, 5\], the model needs \[5, 3\]"):
        store.load(checkpoint, [other])


def test_another_parameter_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 0 of 2 elements of new"):
        store.load(checkpoint, [Piece("new", (2,), 0, {"": torch.zeros(2)})])


def test_another_models_checkpoint_names_the_field(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.ffn_width=12, this run has 16"):
        read_state(checkpoint, replace(MODEL, ffn_width=16))


def test_another_format_is_refused(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        read_state(checkpoint, MODEL)


# ------------------------------------------------------------------------------------------- finding and forgetting


def test_none_and_auto(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert find("auto", folder) is None, "no folder yet: a new run"
    save(folder, step=2)
    newest = save(folder, step=10)
    assert find("none", folder) is None
    assert find("auto", folder) == newest
    assert find(str(folder / "step_0000002"), tmp_path / "another") == folder / "step_0000002"


def test_auto_falls_back_to_the_newest_whole_one(tmp_path: Path) -> None:
    good, bad, worse = (save(tmp_path, step=step) for step in (2, 4, 6))
    (worse / "manifest.json").unlink()
    os.truncate(bad / "state.json", 3)
    assert find("auto", tmp_path) == good
    (good / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"auto finds no whole checkpoint: .*6.*state\.json has 3 bytes.*config\.yaml"):
        find("auto", tmp_path)


def test_an_unfinished_checkpoint_does_not_exist(tmp_path: Path) -> None:
    whole_one = save(tmp_path, step=2)
    unfinished = tmp_path / "step_0000009.partial"
    whole_one.rename(unfinished)
    assert find("auto", tmp_path) is None
    save(tmp_path, step=3, keep=1)
    assert find("auto", tmp_path) == tmp_path / "step_0000003"
    assert unfinished.is_dir(), "another run's unfinished folder is not ours to prune"


def test_an_unfinished_checkpoint_of_the_same_step_is_written_anew(tmp_path: Path) -> None:
    unfinished = tmp_path / "step_0000007.partial"
    unfinished.mkdir()
    (unfinished / "shard_00009.safetensors").write_bytes(b"half")
    path = save(tmp_path)
    assert not unfinished.exists() and not (path / "shard_00009.safetensors").exists()
    load(path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = save(tmp_path)
    (path / "state.json").write_text("old")
    assert save(tmp_path) == path and read_state(path, MODEL) == STATE


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 12]), (1, [12]), (2, [3, 12]), (9, [1, 2, 3, 12])])
def test_the_newest_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 3, 12):
        save(tmp_path, step=step, keep=keep)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step_*")) == left
    assert (tmp_path / "latest").read_text() == "step_0000012\n"


def test_a_new_checkpoint_survives_those_of_an_abandoned_future(tmp_path: Path) -> None:
    """A run that goes back to step 2 while 4 and 6 exist, or whose 4 and 6 are damaged, saves step 3."""
    for step in (2, 4, 6):
        save(tmp_path, step=step)
    assert save(tmp_path, step=3, keep=1).is_dir()
    assert (tmp_path / (tmp_path / "latest").read_text().strip()).is_dir()


def test_weights_of_a_checkpoint_with_a_hole_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, rank=0, world=2)
    with pytest.raises(ValueError, match=r"holds 8 of 15 elements of a\.weight"):
        read_weights(path)


def test_nothing_in_a_checkpoint_is_a_pickle(checkpoint: Path) -> None:
    """safetensors, JSON and YAML only: reading a stranger's checkpoint runs none of his code."""
    header = (checkpoint / "shard_00000.safetensors").read_bytes()
    length = int(np.frombuffer(header[:8], "<u8")[0])
    tensors = json.loads(header[8 : 8 + length])
    assert set(tensors) == {name + suffix for name in SHAPES for suffix in SUFFIXES} | {"__metadata__"}
    assert {tensors[name]["dtype"] for name in SHAPES} == {"F32"}
