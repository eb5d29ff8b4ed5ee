"""Checkpoints that lie under right digests: names that lead elsewhere, files that are none, headers that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.files import as_json, sha256
from beit3_dist.checkpoint.find import Damaged, damaged, find, read_state
from beit3_dist.checkpoint.neutral import write_neutral
from beit3_dist.checkpoint.shard import Shard
from tests.unit.small_checkpoints import MODEL, SHAPES, save
from tests.unit.test_opening import NO_FILES, in_folder

SHARD = "shard_00000.safetensors"
HUGE = 1 << 50
DIGEST = "0" * 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("saved")
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "group"), 1), rank=0, world_size=1)
    yield save(folder / "checkpoints")
    dist.destroy_process_group()


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "manifest.json").read_text())


def write_manifest(checkpoint: Path, content: Any) -> None:
    (checkpoint / "manifest.json").write_text(as_json(content))


def signed(checkpoint: Path) -> None:
    """The manifest that fits the files as they are now."""
    entries = {name: checkpoint / name for name in manifest_of(checkpoint)}
    write_manifest(checkpoint, {n: {"bytes": p.stat().st_size, "sha256": sha256(p)} for n, p in entries.items()})


def uses(checkpoint: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a checkpoint as a whole."""
    return {
        "resume": lambda: find(str(checkpoint), checkpoint.parent),
        "neutral": lambda: write_neutral(checkpoint, checkpoint.parent / "neutral"),
        "weights": lambda: read.read_weights(checkpoint),
    }


USES = ("resume", "neutral", "weights")


# ------------------------------------------------------------------------------------------------------------ manifests


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "name",
    ["../secret", "{0}/secret", "a/../../secret", "./state.json", "logs/rank0.log", ".", "", "..", "notes.txt"]
    + ["shard_1.safetensors/../../secret", "shard_x.safetensors", "SHARD_0.safetensors", "state.json\0", "a\nb"],
)
def test_a_name_that_no_checkpoint_has_is_refused(name: str, use: str, checkpoint: Path) -> None:
    secret = checkpoint.parent / "secret"
    secret.write_text("kept")
    entry = {"bytes": 4, "sha256": sha256(secret)}
    write_manifest(checkpoint, manifest_of(checkpoint) | {name.format(checkpoint.parent): entry})
    with pytest.raises(ValueError, match=r"manifest\.json.*no file of a checkpoint|no file of a checkpoint"):
        uses(checkpoint)[use]()
    assert secret.read_text() == "kept" and not (checkpoint.parent / "neutral").exists()


ENTRIES = {
    "negative": {"bytes": -1, "sha256": DIGEST},
    "a fraction": {"bytes": 1.5, "sha256": DIGEST},
    "true": {"bytes": True, "sha256": DIGEST},
    "text": {"bytes": "4", "sha256": DIGEST},
    "NaN": {"bytes": float("nan"), "sha256": DIGEST},
    "infinite": {"bytes": float("inf"), "sha256": DIGEST},
    "no size": {"sha256": DIGEST},
    "no digest": {"bytes": 4},
    "another digest": {"bytes": 4, "sha256": "d41d8cd98f00b204e9800998ecf8427e"},
    "a number as digest": {"bytes": 4, "sha256": 0},
    "null": None,
    "a list": [4, DIGEST],
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_odd_entry_is_refused(entry: str, checkpoint: Path) -> None:
    write_manifest(checkpoint, manifest_of(checkpoint) | {SHARD: ENTRIES[entry]})
    assert "manifest.json" in damaged(checkpoint)
    for use in uses(checkpoint).values():
        with pytest.raises(ValueError):
            use()


@pytest.mark.parametrize("content", ["[]", "1", "null", "[" * 100_000, '{"a": 1, "a": 2}', "", "\ud800"])
def test_an_odd_manifest_is_refused(content: str, checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "manifest.json" in damaged(checkpoint)
    for use in uses(checkpoint).values():
        with pytest.raises(ValueError):
            use()


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", [SHARD, "state.json", "config.yaml", "manifest.json"])
def test_what_is_no_file_is_never_read(name: str, kind: str, checkpoint: Path) -> None:
    """With a size of 0, as a FIFO and a device have, and whatever digest."""
    if name != "manifest.json":
        write_manifest(checkpoint, manifest_of(checkpoint) | {name: {"bytes": 0, "sha256": DIGEST}})
    (checkpoint / name).unlink()
    with in_folder(checkpoint):
        NO_FILES[kind](checkpoint / name)
    for use in ("resume", "neutral"):
        with pytest.raises(Damaged, match=f"{checkpoint}.*{name}"):
            uses(checkpoint)[use]()
    with pytest.raises((ValueError, OSError), match=name):
        read.read_weights(checkpoint)


def test_linked_files_are_files(checkpoint: Path) -> None:
    """As tools leave them that keep large files elsewhere by their digests."""
    elsewhere = checkpoint.parent / "objects"
    elsewhere.mkdir()
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        path.rename(elsewhere / str(number))
        path.symlink_to(elsewhere / str(number))
    assert find(str(checkpoint), checkpoint.parent) == checkpoint
    write_neutral(checkpoint, checkpoint.parent / "neutral")
    assert not any(path.is_symlink() for path in (checkpoint.parent / "neutral").iterdir())


# --------------------------------------------------------------------------------------------------------------- shards


Header = dict[str, Any]


def with_header(checkpoint: Path, change: Callable[[Header, Header], object]) -> None:
    """Changes the header of the shard, and its fragments, and the manifest with it; the values stay."""
    path = checkpoint / SHARD
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    fragments = json.loads(header["__metadata__"]["fragments"])
    change(header, fragments)
    if "__metadata__" in header and isinstance(header["__metadata__"], dict) and "fragments" in header["__metadata__"]:
        header["__metadata__"]["fragments"] = json.dumps(fragments)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    signed(checkpoint)


def fragment(**values: Any) -> Callable[[Header, Header], object]:
    return lambda _, fragments: fragments["a.weight"].update(values)


def tensor(name: str = "a.weight", **values: Any) -> Callable[[Header, Header], object]:
    return lambda header, _: header[name].update(values)


HEADERS: dict[str, Callable[[Header, Header], object]] = {
    "no metadata": lambda header, _: header.pop("__metadata__"),
    "metadata is a list": lambda header, _: header.update(__metadata__=[]),
    "no fragments": lambda header, _: header["__metadata__"].clear(),
    "a fragment less": lambda _, fragments: fragments.pop("a.bias"),
    "a fragment more": lambda _, fragments: fragments.update(new=fragments["a.bias"]),
    "a fragment is a number": lambda _, fragments: fragments.update({"a.weight": 3}),
    "no start": lambda _, fragments: fragments["a.weight"].pop("start"),
    "a negative start": fragment(start=-1),
    "a start behind the end": fragment(start=HUGE),
    "a start in words": fragment(start="0"),
    "a true start": fragment(start=True),
    "a huge shape": fragment(shape=[HUGE, HUGE]),
    "a negative shape": fragment(shape=[-3, -5]),
    "an empty shape": fragment(shape=[0, 5]),
    "a shape with NaN": fragment(shape=[float("nan"), 5]),
    "a shape in words": fragment(shape="35"),
    "a shape that is a number": fragment(shape=15),
    "a smaller shape": fragment(shape=[3, 4]),
    "a cut into nothing": fragment(cut={"dimension": 0, "part": 0, "parts": 0}),
    "a cut along no dimension": fragment(cut={"dimension": 7, "part": 0, "parts": 1}),
    "a negative cut": fragment(cut={"dimension": -1, "part": 0, "parts": 1}),
    "a part too many": fragment(cut={"dimension": 0, "part": 2, "parts": 2}),
    "a part of too much": fragment(cut={"dimension": 0, "part": 0, "parts": HUGE}),
    "a cut of other fields": fragment(cut={"dimension": 0, "part": 0, "parts": 1, "exec": "x"}),
    "a cut that is a list": fragment(cut=[0, 0, 1]),
    "no shape": lambda header, _: header["a.weight"].pop("shape"),
    "no place": lambda header, _: header["a.weight"].pop("data_offsets"),
    "another type": tensor(dtype="F64"),
    "an unknown type": tensor(dtype=None),
    "more elements than bytes": tensor(shape=[16]),
    "a matrix": tensor(shape=[3, 5]),
    "more bytes than the file": tensor(shape=[HUGE], data_offsets=[0, 4 * HUGE]),
    "a place behind the file": tensor(data_offsets=[HUGE, HUGE + 60]),
    "a negative place": tensor(data_offsets=[-60, 0]),
    "a place with a fraction": tensor(data_offsets=[0.0, 60.0]),
    "a place from behind": tensor(data_offsets=[60, 0]),
    "a shorter moment": tensor("a.weight/exp_avg", shape=[1], data_offsets=[0, 4]),
    "a moment of nothing": lambda header, _: header.update({"b/exp_avg": header["a.bias"]}),
    "a tensor is a list": lambda header, _: header.update({"a.weight": []}),
    "a tensor is missing": lambda header, _: header.pop("a.weight"),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_a_header_that_lies_is_one_line(lie: str, checkpoint: Path) -> None:
    """Its digest is right. Nothing is allocated for it, nothing written, and the file or the parameter is named."""
    with_header(checkpoint, HEADERS[lie])
    assert damaged(checkpoint) == ""
    target = Shard("a.weight", SHAPES["a.weight"], 0, {"": torch.zeros(15)})
    for use in (uses(checkpoint)["neutral"], uses(checkpoint)["weights"], lambda: read.load(checkpoint, [target])):
        with pytest.raises(
            ValueError, match=rf"{checkpoint}(/{SHARD} is no shard| holds \d+ of \d+ elements|: a.weight has shape)"
        ) as error:
            use()
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["step_0000007"]


@pytest.mark.parametrize("length", [0, 7, 1 << 20, HUGE, (1 << 64) - 1])
def test_a_header_of_another_length(length: int, checkpoint: Path) -> None:
    path = checkpoint / SHARD
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    signed(checkpoint)
    for use in ("neutral", "weights"):
        with pytest.raises(ValueError, match=f"{path} is no shard: its header"):
            uses(checkpoint)[use]()


@pytest.mark.parametrize("header", [b"", b"\xff{}", b"[" * 100_000, b'{"a": 1, "a": 2}', b"null", b"NaN"])
def test_a_header_that_is_no_header(header: bytes, checkpoint: Path) -> None:
    (checkpoint / SHARD).write_bytes(struct.pack("<Q", len(header)) + header)
    signed(checkpoint)
    for use in ("neutral", "weights"):
        with pytest.raises(ValueError, match=f"{SHARD} is no shard: its header") as error:
            uses(checkpoint)[use]()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("bytes", range(8))
def test_a_shard_of_a_few_bytes(bytes: int, checkpoint: Path) -> None:
    os.truncate(checkpoint / SHARD, bytes)
    signed(checkpoint)
    with pytest.raises(ValueError, match=f"{SHARD} is no shard"):
        read.read_weights(checkpoint)


# ---------------------------------------------------------------------------------------------------------------- state

STATES: dict[str, Any] = {
    "no step": {"step": None},
    "a negative step": {"step": -1},
    "a step with a fraction": {"step": 7.0},
    "a true step": {"step": True},
    "two counts": {"consumed": [1, 2]},
    "four counts": {"consumed": [1, 2, 3, 4]},
    "counts in words": {"consumed": ["1", "2", "3"]},
    "no counts": {"consumed": None},
    "negative counts": {"consumed": [-1, 0, 0]},
    "counts in words by stream": {"consumed": {"images": "1"}},
    "negative counts by stream": {"consumed": {"images": -1}},
    "skipped steps in words": {"skipped_steps": "many"},
    "readers that are a number": {"readers": 3},
    "readers of words": {"readers": [["a", "b"]]},
    "sources that are a list": {"sources": ["a"]},
}


@pytest.mark.parametrize("lie", STATES)
def test_a_state_that_lies_is_one_line(lie: str, checkpoint: Path) -> None:
    path = checkpoint / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | STATES[lie]))
    with pytest.raises(ValueError, match=r"checkpoint\.resume: .*/state\.json is no state of a run"):
        read_state(checkpoint, MODEL)


@pytest.mark.parametrize("content", ["{}", "[]", "3", "", "[" * 100_000, '{"format": 1}', '{"format": 1, "model": []}'])
def test_another_state_is_one_line(content: str, checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(ValueError, match="step_0000007"):
        read_state(checkpoint, MODEL)
