"""Which checkpoint a run goes on from, and whether it is whole."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from beit3_dist.checkpoint.files import as_json, sha256
from beit3_dist.checkpoint.store import FORMAT, TrainState, checkpoints, step_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SMALL_FILES = ("state.json", "config.yaml")
"""Files that every checkpoint has beside its shards."""

log = logging.getLogger(__name__)


class Damaged(ValueError):
    """The checkpoint that was asked for is not what was saved."""


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `checkpoint.resume` means: none, auto or a path. Raises Damaged where it is not whole.

    `auto` takes the newest whole checkpoint of the run's own folder, and none if there is no checkpoint at all. Whole
    is what `damaged` finds no fault with; the content of the shards is the matter of `verified`.
    """
    if resume == "none":
        return None
    if resume != "auto":
        path = Path(resume)
        if damage := damaged(path):
            inside = list(checkpoints(path / "checkpoints").values())
            hint = f": it is a run's folder; name a checkpoint, such as {inside[-1]}" if inside else ""
            raise Damaged(f"checkpoint.resume: {damage}{hint}")
        return path
    return _newest(folder, list(checkpoints(folder).values()), [])


def _newest(folder: Path, candidates: list[Path], damages: list[str]) -> Path | None:
    """The last candidate that is not damaged. `damages`: what has been found in later ones."""
    for path in reversed(candidates):
        damage = damaged(path)
        if not damage:
            return path
        log.warning("%s: falling back to an older checkpoint", damage)
        damages = [*damages, damage]
    if damages:
        raise Damaged(f"checkpoint.resume=auto finds no whole checkpoint in {folder}: {'; '.join(damages)}")
    return None


def damaged(path: Path) -> str:
    """What is wrong with a checkpoint, by name of the file; empty if nothing is.

    Compares the names and sizes of all files and the digests of the small ones.
    """
    source = path / "manifest.json"
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError) as error:
        return f"{path} is no whole checkpoint: {source}: {error}"
    for name in SMALL_FILES:
        if name not in manifest:
            return f"{path} is no whole checkpoint: {source} does not name {name}"
    for shard in sorted(path.glob("shard_*.safetensors")):
        if shard.name not in manifest:
            return f"{source} does not name {shard}"
    for name, (size, _) in manifest.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            return f"{path} is no whole checkpoint, it lacks a file of its manifest.json: {error}"
        if found != size:
            return f"{path / name} has {found} bytes, its manifest.json says {size}"
    return "; ".join(wrong_digests(path, SMALL_FILES))


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> size in bytes and SHA-256 of a checkpoint. Raises OSError or ValueError where it cannot be read."""
    text = (path / "manifest.json").read_text()
    content = json.loads(text)
    if text != as_json(content):  # a name twice, a byte less at the end
        raise ValueError("it is not as it was written")
    try:
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in content.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it lacks sizes or digests ({error!r})") from None


def wrong_digests(path: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with the content of these files of a checkpoint, by name of the file."""
    manifest = read_manifest(path)

    def fault(name: str) -> str:
        try:
            right = sha256(path / name) == manifest[name][1]
        except OSError as error:
            return str(error)
        return "" if right else f"{path / name}: the SHA-256 is not the one in manifest.json: the file is damaged"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return [found for found in threads.map(fault, names) if found]


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
    values = {field.name: content[field.name] for field in fields(TrainState) if field.name in content}
    return TrainState(**values | {"consumed": tuple(content["consumed"])})


# --------------------------------------------------------------------------------------- with all ranks of the run


def verified(path: Path | None, resume: str, folder: Path) -> Path | None:
    """The checkpoint to go on from, after the ranks have read all of it, each a share of its files. Collective.

    `path`: what `find` chose. Where a digest is wrong, `auto` goes on to the newest whole checkpoint before it; else
    every rank raises Damaged with the file's name. Nothing has been changed by then.
    """
    _assert_seen_by_all(path)
    damages: list[str] = []
    while path is not None:
        found = _damages(path)
        if not found:
            return path
        if resume != "auto":
            raise Damaged(f"checkpoint.resume: {'; '.join(found)}")
        log.warning("%s: falling back to an older checkpoint", "; ".join(found))
        damages += found
        older = [other for step, other in checkpoints(folder).items() if step < step_of(path)]
        path = _newest(folder, older, damages)
        _assert_seen_by_all(path)
    return None


def _damages(path: Path) -> list[str]:
    """What any rank finds in its share of the shards."""
    shards = sorted(set(read_manifest(path)) - set(SMALL_FILES))
    return sum(_gather(wrong_digests(path, shards[dist.get_rank() :: dist.get_world_size()])), [])


def _assert_seen_by_all(path: Path | None) -> None:
    """Raises Damaged where the ranks do not see the same checkpoint: on a disk of one node, for example."""
    seen = _gather(str(path))
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise Damaged(
                f"checkpoint.resume: rank 0 finds {seen[0]}, rank {rank} finds {other}: "
                "`out` must be on a file system that all nodes share"
            )


def _gather(value: Any) -> list[Any]:
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, value)
    return everyones
