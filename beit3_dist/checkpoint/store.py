"""Sharded checkpoints that are whole or absent.

    checkpoints/step_0000100/
        state.json                step, samples consumed, model, optimizer steps, versions
        config.yaml               the resolved config of the run
        shard_00000.safetensors   fragments of one rank: master weights NAME, moments NAME/exp_avg, NAME/exp_avg_sq
        manifest.json             size and SHA-256 of every file above; written last
    checkpoints/latest            name of the newest checkpoint

A fragment is a piece of a flattened parameter under its canonical name; its place stands in the shard's header. So a
checkpoint loads at any number of data-parallel ranks and at any ZeRO stage. A checkpoint is written in a folder named
`*.partial` and renamed when every file of every rank is synced; `latest` follows.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from beit3_dist.checkpoint.files import sha256, sync, write_json, write_text
from beit3_dist.config import BatchConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 1


@dataclass
class Piece:
    """Elements [start, start + numel) of a flattened parameter, with everything that belongs to them."""

    name: str
    """Canonical name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the piece."""
    tensors: dict[str, Tensor]
    """Suffix of the stored name -> values, float32 [numel]: "" for the master weights, "/exp_avg" ... for moments."""

    @property
    def numel(self) -> int:
        """Elements of the piece."""
        return self.tensors[""].numel()


@dataclass
class TrainState:
    """What a run has to remember beside weights and moments."""

    step: int = 0
    """Optimizer steps taken."""
    consumed: tuple[int, int, int] = (0, 0, 0)
    """Samples consumed of images, texts and pairs."""
    bad_samples: int = 0
    """Samples that had to be replaced so far."""

    def advance(self, batch: BatchConfig, replaced: int) -> None:
        """Counts one more step."""
        images, texts, pairs = self.consumed
        self.consumed = (images + batch.images, texts + batch.texts, pairs + batch.pairs)
        self.step += 1
        self.bad_samples += replaced


def step_name(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step_{step:07d}"


# ---------------------------------------------------------------------------------------------------------- writing


def save(
    folder: Path,
    pieces: Iterable[Piece],
    state: TrainState,
    model: DataclassInstance,
    config_yaml: str,
    versions: dict[str, str],
    keep: int,
) -> Path:
    """Writes checkpoint `step_NNNNNNN` below `folder` and points `latest` to it. Collective.

    `pieces`: what this rank contributes; over all ranks every element once. The newest `keep` stay (0: all).
    """
    rank = dist.get_rank()
    final = folder / step_name(state.step)
    partial = final.with_name(final.name + ".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    shard = partial / f"shard_{rank:05d}.safetensors"
    _write_shard(shard, pieces)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (shard.name, _entry(shard)))
    if rank == 0:
        write_json(
            partial / "state.json", {"format": FORMAT, **asdict(state), "model": asdict(model), "versions": versions}
        )
        write_text(partial / "config.yaml", config_yaml)
        manifest = dict(everyones) | {name: _entry(partial / name) for name in ("state.json", "config.yaml")}
        write_json(partial / "manifest.json", manifest)
        if final.exists():  # saved before a resume from an older step
            shutil.rmtree(final)
        partial.rename(final)
        sync(folder)
        write_text(folder / "latest", final.name + "\n")
        _prune(folder, keep)
    dist.barrier()
    return final


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_shard(path: Path, pieces: Iterable[Piece]) -> None:
    pieces = [piece for piece in pieces if piece.numel]
    tensors = {
        piece.name + suffix: values.detach().cpu().contiguous()
        for piece in pieces
        for suffix, values in piece.tensors.items()
    }
    places = {piece.name: {"start": piece.start, "shape": piece.shape} for piece in pieces}
    save_file(tensors, path, metadata={"fragments": json.dumps(places)})
    sync(path)


def _prune(folder: Path, keep: int) -> None:
    names = sorted(p.name for p in folder.glob("step_*") if not p.name.endswith(".partial"))
    for name in names[:-keep] if keep else []:
        shutil.rmtree(folder / name)


# ---------------------------------------------------------------------------------------------------------- finding


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `checkpoint.resume` means: none, auto or a path. Raises ValueError where it is damaged.

    `auto` takes the newest whole checkpoint of the run's own folder, and none if there is no checkpoint at all.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        damage = damaged(path)
        if damage:
            raise ValueError(f"checkpoint.resume: {damage}")
        return path
    candidates = sorted((p for p in folder.glob("step_*") if not p.name.endswith(".partial")), reverse=True)
    damages = []
    for path in candidates:
        damage = damaged(path)
        if not damage:
            return path
        damages.append(damage)
    if damages:
        raise ValueError(f"checkpoint.resume=auto finds no whole checkpoint: {'; '.join(damages)}")
    return None


def damaged(path: Path) -> str:
    """What is wrong with a checkpoint, by name of the file; empty if nothing is. Compares names and sizes."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, entry in manifest.items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{path / name} has {size} bytes, its manifest says {entry['bytes']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is no whole checkpoint: {error}"
    return ""


def read_state(path: Path, model: DataclassInstance) -> TrainState:
    """The state in a checkpoint. Raises ValueError where its model differs from `model`, naming the field."""
    content = json.loads((path / "state.json").read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"checkpoint.resume: {path} has format {content['format']}, this version reads {FORMAT}")
    for name, value in asdict(model).items():
        if content["model"].get(name) != value:
            raise ValueError(
                f"checkpoint.resume: {path} was trained with model.{name}={content['model'].get(name)}, "
                f"this run has {value}: use its config, or another `out` to start anew"
            )
    return TrainState(content["step"], tuple(content["consumed"]), content["bad_samples"])


# ---------------------------------------------------------------------------------------------------------- reading


def load(path: Path, pieces: Iterable[Piece]) -> None:
    """Fills the pieces' tensors from a checkpoint that may have been cut into other pieces. Collective.

    Raises ValueError where a file's digest is wrong or elements are missing.
    """
    _verify_digests(path)
    with ExitStack() as stack:
        shards = []
        for file in sorted(path.glob("shard_*.safetensors")):
            shard = stack.enter_context(safe_open(file, framework="pt"))
            shards.append((shard, json.loads(shard.metadata()["fragments"])))
        for piece in pieces:
            for suffix, target in piece.tensors.items():
                _fill(target, piece, suffix, shards, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The whole model of a checkpoint, name -> float32 tensor on the CPU, in one process and without DeepSpeed."""
    flat: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for file in sorted(path.glob("shard_*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name, place in json.loads(shard.metadata()["fragments"]).items():
                shapes[name] = place["shape"]
                piece = shard.get_tensor(name)
                whole = flat.setdefault(name, torch.full((math.prod(place["shape"]),), math.nan))
                whole[place["start"] : place["start"] + piece.numel()] = piece
    return {name: whole.view(shapes[name]) for name, whole in flat.items()}


def _fill(target: Tensor, piece: Piece, suffix: str, shards: list[tuple[Any, dict[str, Any]]], path: Path) -> None:
    """Copies into `target` [piece.numel] whatever the shards hold of it."""
    found = 0
    for shard, places in shards:
        place = places.get(piece.name)
        if place is None:
            continue
        if tuple(place["shape"]) != piece.shape:
            raise ValueError(f"{path}: {piece.name} has shape {place['shape']}, the model needs {list(piece.shape)}")
        stored = shard.get_slice(piece.name + suffix)
        begin = max(piece.start, place["start"])
        end = min(piece.start + piece.numel, place["start"] + stored.get_shape()[0])
        if begin < end:
            target[begin - piece.start : end - piece.start].copy_(stored[begin - place["start"] : end - place["start"]])
            found += end - begin
    if found != piece.numel:
        raise ValueError(f"{path} holds {found} of {piece.numel} elements of {piece.name}{suffix}")


def _verify_digests(path: Path) -> None:
    """Every rank verifies its share of the files; all ranks raise if one finds a wrong one."""
    manifest = json.loads((path / "manifest.json").read_text())
    wrong = [
        str(path / name)
        for name in sorted(manifest)[dist.get_rank() :: dist.get_world_size()]
        if sha256(path / name) != manifest[name]["sha256"]
    ]
    everyones: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, wrong)
    if all_wrong := sum(everyones, []):
        raise ValueError(
            f"checkpoint.resume: {', '.join(all_wrong)}: the SHA-256 is not the manifest's; the file is damaged"
        )
