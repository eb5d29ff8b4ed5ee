"""Checkpoints hold what was saved, are found and forgotten as they should be."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.find import damaged, find, read_state
from beit3_dist.checkpoint.read import StoredShards, read_weights
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.snapshot import Snapshot
from beit3_dist.checkpoint.store import TrainState
from beit3_dist.parallel.mesh import Groups
from tests.parallel.workers import run_workers
from tests.unit.small_checkpoints import (
    MODEL,
    SHAPES,
    STATE,
    SUFFIXES,
    begin,
    load,
    open_store,
    pieces,
    save,
    whole,
)
from tests.unit.small_checkpoints import one_process as one_process

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints")


def save_in_worker(groups: Groups, folder: str) -> None:
    save(Path(folder), rank=groups.mesh.rank, world=groups.mesh.world)


def load_in_worker(groups: Groups, path: str) -> None:
    load(Path(path), groups.mesh.rank, groups.mesh.world)


# ---------------------------------------------------------------------------------------------------------- contents


def test_what_is_saved_is_loaded(checkpoint: Path) -> None:
    assert checkpoint.name == "step_0000007"
    assert (checkpoint.parent / "latest").read_text() == "step_0000007\n"
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "shard_00000.safetensors",
        "state.json",
        "tensors.json",
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
    read.load(checkpoint, [target])
    assert torch.equal(buffer[11:26], whole("a.weight", ""))
    assert not buffer[:11].any() and not buffer[26:].any()


def test_advancing_counts_samples() -> None:
    state = TrainState()
    for replaced in (0, 2):
        state.advance({"images": 6, "texts": 4}, replaced)
    assert state == TrainState(step=2, consumed={"images": 12, "texts": 8}, bad_samples=2)


def test_missing_elements_are_counted(tmp_path: Path) -> None:
    """One of two ranks' shards alone, with a manifest that fits it."""
    path = save(tmp_path, rank=0, world=2)
    with pytest.raises(ValueError, match=r"holds 8 of 15 elements of a\.weight"):
        load(path)


def test_another_shape_is_refused(checkpoint: Path) -> None:
    other = Shard("a.weight", (5, 3), 0, {"": torch.zeros(15)})
    with pytest.raises(ValueError, match=r"a\.weight has shape \[3, 5\], the model needs \[5, 3\]"):
        read.load(checkpoint, [other])


def test_another_parameter_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 0 of 2 elements of new"):
        read.load(checkpoint, [Shard("new", (2,), 0, {"": torch.zeros(2)})])


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
    with pytest.raises(
        ValueError, match=r"auto finds no whole checkpoint in .*6.*state\.json has 3 bytes.*config\.yaml"
    ):
        find("auto", tmp_path)


def test_an_unfinished_checkpoint_does_not_exist(tmp_path: Path) -> None:
    whole_one = save(tmp_path, step=2)
    unfinished = tmp_path / "step_0000009.partial"
    whole_one.rename(unfinished)
    assert find("auto", tmp_path) is None
    save(tmp_path, step=3, keep=1)
    assert find("auto", tmp_path) == tmp_path / "step_0000003"
    assert not unfinished.exists(), "what a killed run has left is room for the next"


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
    assert (tmp_path / "abandoned_step_0000007" / "state.json").read_text() == "old"


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 12]), (1, [3, 12]), (2, [2, 3, 12]), (9, [1, 2, 3, 12])])
def test_the_newest_good_ones_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    """And what no step has followed."""
    for step in (1, 2, 3, 12):
        save(tmp_path, step=step, keep=keep)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step_*")) == left
    assert (tmp_path / "latest").read_text() == "step_0000012\n"


def test_multiples_of_keep_every_are_kept_for_ever(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10, 12, 14):
        save(tmp_path, step=step, keep=1, keep_every=6)
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir() if p.is_dir()) == [6, 12, 14]


def test_only_finite_steps_let_older_checkpoints_go(tmp_path: Path) -> None:
    """Step 5 destroys the weights: what is saved from there on is not good, and takes nothing good away; once the run
    has gone back behind it, it is moved aside."""
    kept = lambda: sorted(int(p.name[5:]) for p in tmp_path.glob("step_???????"))  # noqa: E731
    to, state = open_store(tmp_path, keep=1), TrainState()
    for step in range(1, 12):
        state.advance({"images": 1}, 0, skipped=step > 5)
        if step % 2 == 0:
            to.save(pieces(0, 1), state, MODEL, "", {})
            to.wait()
        to.vouch(state)
        to.check()
    assert kept() == [4, 6, 8, 10] and [path.name for path in to.good()] == ["step_0000004"]
    assert read_state(tmp_path / "step_0000010", MODEL).last_finite == 5

    to, state = open_store(tmp_path, keep=1, start=4), TrainState(step=4)
    for _ in range(3):
        state.advance({"images": 1}, 0)
        to.vouch(state)
    assert [path.name for path in to.good()] == ["step_0000004"], "6 is of the attempt that went wrong"
    to.save(pieces(0, 1), state, MODEL, "", {})
    to.wait()
    assert kept() == [4, 7] and sorted(p.name[-2:] for p in tmp_path.glob("abandoned_*")) == ["06", "08", "10"]
    state.advance({"images": 1}, 0)
    to.vouch(state)
    deadline = time.monotonic() + 60
    while kept() != [7]:
        assert time.monotonic() < deadline, "a good checkpoint lets older ones go at once"


def test_a_checkpoint_that_cannot_be_removed_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NFS: rmdir finds a .nfs file, which is there until a process somewhere has closed it."""
    save(tmp_path, step=1)
    rmtree = shutil.rmtree

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (2, 3):  # each run meets what the one before could not remove
        save(tmp_path, step=step)
    for step in (4, 5):
        path = save(tmp_path, step=step, keep=1)
        assert damaged(path) == "" and find("auto", tmp_path) == path
    left = [f"step_000000{step}.partial" for step in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.glob("*.partial")) == left
    assert "step_0000001.partial could not be removed" in caplog.text and "Directory not empty" in caplog.text
    to = open_store(tmp_path, keep=1, start=5)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    begin(to, step=6)
    to.wait()
    names = ["step_0000005", "step_0000006"]
    assert sorted(p.name for p in tmp_path.glob("step_*")) == names, "the next checkpoint tries again"


def test_a_new_checkpoint_survives_those_of_an_abandoned_future(tmp_path: Path) -> None:
    """A run that goes back to step 2 while 4 and 6 exist, or whose 4 and 6 are damaged, saves step 3."""
    for step in (2, 4, 6):
        save(tmp_path, step=step)
    assert save(tmp_path, step=3, keep=1).is_dir()
    assert find("auto", tmp_path) == tmp_path / "step_0000003"
    assert sorted(p.name for p in tmp_path.glob("abandoned_*")) == ["abandoned_step_0000004", "abandoned_step_0000006"]


def test_latest_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each change of a name in the folder, also while the run has gone back and saves a step again."""
    rename, replace_file, seen = Path.rename, os.replace, []

    def look() -> None:
        latest = tmp_path / (tmp_path / "latest").read_text().strip()
        assert damaged(latest) == ""
        seen.append(latest.name)

    for step in (2, 4, 6):
        save(tmp_path, step=step)
    monkeypatch.setattr(Path, "rename", lambda self, target: (look(), rename(self, target))[1])
    monkeypatch.setattr(os, "replace", lambda source, target: (look(), replace_file(source, target))[1])
    save(tmp_path, step=4, keep=1)
    look()
    assert seen[0] == "step_0000006" and "step_0000002" in seen and seen[-1] == "step_0000004"


def test_weights_of_a_checkpoint_with_a_hole_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, rank=0, world=2)
    with pytest.raises(ValueError, match=r"holds 8 of 15 elements of a\.weight"):
        read_weights(path)


def test_a_shard_is_a_safetensors_file(checkpoint: Path) -> None:
    """Its own writer and reader agree with the library's."""
    shard = checkpoint / "shard_00000.safetensors"
    tensors = load_file(shard)
    assert all(torch.equal(tensors[name + suffix], whole(name, suffix)) for name in SHAPES for suffix in SUFFIXES)
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    shard.unlink()
    save_file(tensors, shard, metadata)  # other headers, another order
    load(checkpoint)


def test_a_shard_of_nothing(tmp_path: Path) -> None:
    """Ranks that hold nothing to save."""
    snapshot = Snapshot(torch.device("cpu"))
    snapshot.take([])
    assert snapshot.write(tmp_path / "shard_00000.safetensors")[0]["bytes"] > 8
    assert load_file(tmp_path / "shard_00000.safetensors") == {} and StoredShards(tmp_path).names == []


def test_nothing_in_a_checkpoint_is_a_pickle(checkpoint: Path) -> None:
    """safetensors, JSON and YAML only: reading a stranger's checkpoint runs none of his code."""
    header = (checkpoint / "shard_00000.safetensors").read_bytes()
    length = int(np.frombuffer(header[:8], "<u8")[0])
    tensors = json.loads(header[8 : 8 + length])
    assert set(tensors) == {name + suffix for name in SHAPES for suffix in SUFFIXES} | {"__metadata__"}
    assert {tensors[name]["dtype"] for name in SHAPES} == {"F32"}
