"""Sharded checkpoints that are whole or absent.

    checkpoints/step_0000100/
        state.json                step, samples consumed, model, optimizer steps, versions
        config.yaml               the resolved config of the run
        shard_00000.safetensors   fragments of one rank: master weights NAME, moments NAME/exp_avg, NAME/exp_avg_sq
        manifest.json             size and SHA-256 of every file above; written last
    checkpoints/latest            name of the newest checkpoint

A fragment is a piece of a flattened parameter, or of its part on a tensor rank, under its canonical name; its place
stands in the shard's header. So a checkpoint loads in any layout: at another number of data-parallel or tensor ranks,
at another ZeRO stage. It is written in a folder named `*.partial`, which is renamed when every file of every rank is
synced; `latest` follows.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from beit3_dist.checkpoint.files import sha256, sync, write_json, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 1


@dataclass(frozen=True)
class Cut:
    """One of the equal parts that a parameter is cut into along a dimension; the last ones are padded with zeros."""

    dimension: int
    part: int
    parts: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(-(-n // self.parts) if d == self.dimension else n for d, n in enumerate(whole))

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole parameter."""
        rows = self.shape(tuple(whole.shape))[self.dimension]
        begin, end = (min(n * rows, whole.shape[self.dimension]) for n in (self.part, self.part + 1))
        mine = whole.narrow(self.dimension, begin, end - begin)
        missing = rows - mine.shape[self.dimension]
        return pad(mine, (0, 0) * (whole.ndim - 1 - self.dimension) + (0, missing)) if missing else mine


@dataclass
class Piece:
    """Elements [start, start + numel) of a flattened parameter, or of a part of it, with all that belongs to them."""

    name: str
    """Canonical name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the piece in the flattened parameter or part."""
    tensors: dict[str, Tensor]
    """Suffix of the stored name -> values, float32 [numel]: "" for the master weights, "/exp_avg" ... for moments."""
    cut: Cut | None = None
    """Where the parameter is cut over tensor ranks: the part that the piece belongs to."""

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

    def advance(self, samples: tuple[int, int, int], replaced: int) -> None:
        """Counts one more step of so many samples of each kind."""
        images, texts, pairs = (before + more for before, more in zip(self.consumed, samples, strict=True))
        self.consumed = (images, texts, pairs)
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
        _prune(folder, final, keep)
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
    places = {
        piece.name: {"start": piece.start, "shape": piece.shape, "cut": piece.cut and asdict(piece.cut)}
        for piece in pieces
    }
    save_file(tensors, path, metadata={"fragments": json.dumps(places)})
    sync(path)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Keeps the newest `keep` checkpoints. What lies ahead of the one just written comes from before the run went back
    to an older step; it is renamed, so that nothing goes on from it by accident."""
    checkpoints = sorted(_checkpoints(folder), key=_step_of)
    for path in checkpoints[checkpoints.index(newest) + 1 :]:
        aside = path.with_name(f"abandoned_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    for path in checkpoints[: max(0, checkpoints.index(newest) + 1 - keep)] if keep else []:
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


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
    candidates = sorted(_checkpoints(folder), key=_step_of, reverse=True)
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
    with _Shards(path) as shards:
        for piece in pieces:
            for suffix, target in piece.tensors.items():
                shards.fill(target, piece, suffix)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The whole model of a checkpoint, name -> float32 tensor on the CPU, in one process and without DeepSpeed."""
    with _Shards(path) as shards:
        return {name: shards.whole(name, "") for name in shards.stored}


@dataclass
class _Stored:
    """A piece in an open file."""

    file: Any
    start: int
    shape: tuple[int, ...]
    cut: Cut | None


class _Shards(AbstractContextManager["_Shards"]):
    """All pieces of a checkpoint by the name of their parameter, read only where they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path, self._files = path, ExitStack()
        self.stored: dict[str, list[_Stored]] = {}
        for name in sorted(path.glob("shard_*.safetensors")):
            file = self._files.enter_context(safe_open(name, framework="pt"))
            for parameter, place in json.loads(file.metadata()["fragments"]).items():
                cut = Cut(**place["cut"]) if place["cut"] else None
                piece = _Stored(file, place["start"], tuple(place["shape"]), cut)
                self.stored.setdefault(parameter, []).append(piece)

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def fill(self, target: Tensor, piece: Piece, suffix: str) -> None:
        """Copies the piece's values into `target` [numel]. Raises ValueError where the checkpoint lacks some."""
        stored = self.stored.get(piece.name, [])
        for other in stored:
            if other.shape != piece.shape:
                raise ValueError(
                    f"{self._path}: {piece.name} has shape {list(other.shape)}, the model needs {list(piece.shape)}"
                )
        if stored and (stored[0].cut and stored[0].cut.parts) != (piece.cut and piece.cut.parts):
            whole = self.whole(piece.name, suffix)  # cut into another number of parts: put together and cut anew
            part = whole if piece.cut is None else piece.cut.of(whole)
            target.copy_(part.reshape(-1)[piece.start : piece.start + piece.numel])
        else:
            same = [other for other in stored if other.cut == piece.cut]
            self._copy(target, piece.start, same, piece.name + suffix)

    def whole(self, name: str, suffix: str) -> Tensor:
        """A whole parameter (or moment), float32 on the CPU."""
        stored = self.stored[name]
        shape, cut = stored[0].shape, stored[0].cut
        if cut is None:
            flat = torch.empty(math.prod(shape))
            self._copy(flat, 0, stored, name + suffix)
            return flat.view(shape)
        parts = []
        for part in range(cut.parts):
            flat = torch.empty(math.prod(cut.shape(shape)))
            mine = [other for other in stored if other.cut is not None and other.cut.part == part]
            self._copy(flat, 0, mine, name + suffix)
            parts.append(flat.view(cut.shape(shape)))
        return torch.cat(parts, dim=cut.dimension).narrow(cut.dimension, 0, shape[cut.dimension])

    def _copy(self, target: Tensor, start: int, stored: list[_Stored], key: str) -> None:
        """Copies elements [start, start + numel) of what the pieces, which do not overlap, hold together."""
        found, stop = 0, start + target.numel()
        for piece in stored:
            values = piece.file.get_slice(key)
            begin, end = max(start, piece.start), min(stop, piece.start + values.get_shape()[0])
            if begin < end:
                target[begin - start : end - start].copy_(values[begin - piece.start : end - piece.start])
                found += end - begin
        if found != target.numel():
            raise ValueError(f"{self._path} holds {found} of {target.numel()} elements of {key}")


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
