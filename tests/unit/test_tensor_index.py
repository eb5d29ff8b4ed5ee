"""The index of a checkpoint tells of every shard, in few words however many ranks have saved."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint import find, read
from beit3_dist.checkpoint.find import Damaged, damaged, read_index
from beit3_dist.checkpoint.read import StoredShards, read_weights
from beit3_dist.checkpoint.tensor_index import CHUNK, Held, TensorIndex, chunk_digests, index_text, runs_of
from beit3_dist.model.cut import Cut
from beit3_dist.opening import open_regular
from tests.unit.damages import flip
from tests.unit.small_checkpoints import SHAPES, load, pieces, save, whole
from tests.unit.small_checkpoints import one_process as one_process

pytestmark = pytest.mark.usefixtures("one_process")

SUFFIXES = ("", "/exp_avg")


def held_by(ranks: int, tensor: int, numel: int) -> list[list[Held]]:
    """A parameter of tensor x numel elements as ZeRO-3 cuts its parts over ranks / tensor replicas, the last ones
    shorter or with nothing, and one that a single rank has."""
    replicas, files = ranks // tensor, []
    share = -(-numel // replicas)
    for rank in range(ranks):
        replica, part = divmod(rank, tensor)
        start, stop = min(replica * share, numel), min((replica + 1) * share, numel)
        cut = Cut(0, part, tensor) if tensor > 1 else None
        shards = [Held("a", (tensor * numel,), start, stop - start, cut, SUFFIXES)] if stop > start else []
        files.append([*shards, *([Held("b", (3,), 0, 3, None, ("",))] if rank == 1 else [])])
    return files


@pytest.mark.parametrize(
    ("ranks", "tensor", "numel"), [(1, 1, 7), (4, 1, 8), (4, 1, 10), (6, 2, 5), (8, 4, 1), (12, 2, 29)]
)
def test_every_shard_is_found_and_no_other(ranks: int, tensor: int, numel: int) -> None:
    files = held_by(ranks, tensor, numel)
    _, runs = runs_of(enumerate(files))["a"]
    for begin in range(numel):
        for end in range(begin + 1, numel + 1):
            found = {(file, start, run.numel) for run in runs for file, start in run.within(begin, end)}
            assert found == {
                (number, held.start, held.numel)
                for number, shards in enumerate(files)
                for held in shards
                if held.name == "a" and held.start < end and begin < held.start + held.numel
            }


def test_its_size_does_not_depend_on_the_ranks() -> None:
    few, many = (runs_of(enumerate(held_by(ranks, 2, 10_000))) for ranks in (8, 2048))
    assert len(few["a"][1]) == len(many["a"][1]) == 2, "a run for each part"
    assert len(index_text(many, {})) < 2 * len(index_text(few, {}))


def test_what_is_written_is_read() -> None:
    runs = runs_of(enumerate(held_by(6, 2, 5)))
    chunks = {f"shard_{number:05d}.safetensors": ["0" * 64, f"{number}" * 64] for number in range(6)}
    index = TensorIndex.read(index_text(runs, chunks), dict.fromkeys(chunks, CHUNK + 1))
    assert index == TensorIndex(CHUNK, chunks, runs)


def test_pieces_have_digests_wherever_parts_end() -> None:
    content = bytes(range(256)) * 3
    for cut in (0, 1, 99, 100, 101, 300, len(content)):
        parts = [content[:cut], memoryview(content[cut:])]
        assert chunk_digests(parts, 100) == [
            hashlib.sha256(content[at : at + 100]).hexdigest() for at in range(0, len(content), 100)
        ]
    assert chunk_digests([b""], 100) == [] and len(chunk_digests([bytes(200)], 100)) == 2


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints")


def change(path: Path, how: Callable[[dict[str, Any]], None]) -> None:
    """Another index under a right digest."""
    content = json.loads((path / "tensors.json").read_text())
    how(content)
    text = json.dumps(content) + "\n"
    (path / "tensors.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"]["index"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / "manifest.json").write_text(find.as_json(manifest))


def run_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["tensors"]["a.weight"]["runs"][0]


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a file that is not there": lambda content: run_of(content).update(first=7),
    "more files than there are": lambda content: run_of(content).update(files=1 << 40),
    "more elements than the file has": lambda content: run_of(content).update(numel=1 << 40),
    "elements beyond the end": lambda content: run_of(content).update(start=9),
    "another start": lambda content: run_of(content).update(start=1, numel=14),
    "a part that cannot be": lambda content: run_of(content).update(cut=[5, 0, 2]),
    "a number that is none": lambda content: run_of(content).update(numel=1.5),
    "an unknown field": lambda content: run_of(content).update(more=1),
    "a suffix that is not there": lambda content: run_of(content).update(suffixes=4),
    "a larger shape": lambda content: content["tensors"]["a.weight"].update(shape=[1 << 30, 1 << 30]),
    "no digests": lambda content: content["chunks"].update({"shard_00000.safetensors": []}),
    "digests of another file": lambda content: content["chunks"].update({"../secret": ["0" * 64]}),
    "no size of pieces": lambda content: content.update(chunk=0),
    "nothing": lambda content: content.clear(),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies_is_refused_in_one_line(lie: str, checkpoint: Path) -> None:
    change(checkpoint, LIES[lie])
    for use in (lambda: read_weights(checkpoint), lambda: load(checkpoint)):
        with pytest.raises((ValueError, OSError)) as refusal:
            use()
        assert "\n" not in str(refusal.value) and str(checkpoint) in str(refusal.value)


def test_a_checkpoint_of_a_former_version_is_read_as_before(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    former = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in manifest.items()}
    (checkpoint / "manifest.json").write_text(find.as_json(former))
    (checkpoint / "tensors.json").unlink()
    assert damaged(checkpoint) == "" and read_index(checkpoint) is None
    load(checkpoint)
    assert torch.equal(read_weights(checkpoint)["a.weight"].flatten(), whole("a.weight", ""))


def test_former_versions_find_in_the_manifest_what_they_know(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest.keys() == {"shard_00000.safetensors", "state.json", "config.yaml"}
    assert all({"bytes", "sha256"} <= entry.keys() for entry in manifest.values())


def test_only_what_is_read_is_compared(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damage in the moments, which are other pieces of the file, is the matter of who reads them."""
    monkeypatch.setattr("beit3_dist.checkpoint.snapshot.chunk_digests", lambda parts: chunk_digests(parts, 16))
    monkeypatch.setattr("beit3_dist.checkpoint.tensor_index.CHUNK", 16)
    fine = save(tmp_path / "fine")
    shard = fine / "shard_00000.safetensors"
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    content = shard.read_bytes()[header:]
    numbers = whole("a.bias", "/exp_avg").numpy().tobytes()
    flip(shard, header + content.index(numbers) + 4)
    assert torch.equal(read_weights(fine)["a.weight"].flatten(), whole("a.weight", ""))
    stored = StoredShards(fine, read_index(fine), checked=True)
    assert stored.whole("a.bias", "").shape == SHAPES["a.bias"]
    with pytest.raises(Damaged, match="shard_00000.safetensors: the SHA-256 is not the one"):
        stored.whole("a.bias", "/exp_avg")


def test_files_with_nothing_of_it_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks' files, each with half of every parameter."""
    path = save(tmp_path / "both", rank=0, world=2)
    second = save(tmp_path / "second", rank=1, world=2)
    shutil.copy(second / "shard_00000.safetensors", path / "shard_00001.safetensors")
    opened: list[str] = []
    monkeypatch.setattr(read, "open_regular", lambda file: opened.append(file.name) or open_regular(file))
    stored = StoredShards(path, read_index(path))
    for piece in pieces(0, 2, empty=True):
        stored.fill(piece.tensors[""], piece, "")
    assert set(opened) == {"shard_00000.safetensors"}
