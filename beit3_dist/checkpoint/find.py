"""Which checkpoint a run goes on from, and whether it is whole."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from beit3_dist.checkpoint.files import as_json, sha256
from beit3_dist.checkpoint.store import FORMAT, INDEX_ENTRY, INDEX_OF, LATEST, TrainState, checkpoints, step_of
from beit3_dist.checkpoint.tensor_index import INDEX, MOST_INDEX, TensorIndex
from beit3_dist.config import ModelConfig
from beit3_dist.gathering import gather_objects, scatter_objects
from beit3_dist.opening import blaming, parse_json, read_json, read_text, regular_size

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
        try:
            path = pointed_at(Path(resume))
        except Damaged as error:
            raise Damaged(f"checkpoint.resume: {error}") from None
        if damage := damaged(path):
            inside = list(checkpoints(path / "checkpoints").values())
            hint = f": it is a run's folder; name a checkpoint, such as {inside[-1]}" if inside else ""
            raise Damaged(f"checkpoint.resume: {damage}{hint}")
        return path
    return _newest(folder, list(checkpoints(folder).values()), [])


def pointed_at(path: Path) -> Path:
    """The checkpoint that RUN/checkpoints/latest names, where that is the path; any other path itself. Raises Damaged
    where there is no such checkpoint beside it."""
    if path.name != LATEST or not path.is_file():
        return path
    name = read_text(path).strip()
    beside = {checkpoint.name: checkpoint for checkpoint in checkpoints(path.parent).values()}
    if name not in beside:
        raise Damaged(f"{path} names {name!r}, and there is no such checkpoint beside it")
    return beside[name]


def checkpoint_of(path: Path) -> Path:
    """The checkpoint whose weights a path means: the newest whole one of RUN or RUN/checkpoints, the one that
    RUN/checkpoints/latest names; any other path means itself. Raises Damaged where there is none that is whole."""
    for folder in (path / "checkpoints", path):
        if candidates := list(checkpoints(folder).values()):
            return _newest(folder, candidates, [], str(path)) or path
    return pointed_at(path)


def _newest(
    folder: Path, candidates: list[Path], damages: list[str], asked: str = "checkpoint.resume=auto"
) -> Path | None:
    """The last candidate that is not damaged. `damages`: what has been found in later ones. `asked`: who wants it."""
    for path in reversed(candidates):
        damage = damaged(path)
        if not damage:
            return path
        log.warning("%s: falling back to an older checkpoint", damage)
        damages = [*damages, damage]
    if damages:
        raise Damaged(f"{asked} finds no whole checkpoint in {folder}: {'; '.join(damages)}")
    return None


def newest_whole(candidates: Iterable[Path]) -> Path | None:
    """The last one that is not damaged; None: there is none."""
    return next((path for path in reversed(list(candidates)) if not damaged(path)), None)


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
    for file in sorted(path.glob("shard_*.safetensors")):
        if file.name not in manifest:
            return f"{source} does not name {file}"
    for name, (size, _) in manifest.items():
        try:
            found = regular_size(path / name)
        except OSError as error:
            return f"{path} is no whole checkpoint, it lacks a file of its manifest.json: {error}"
        if found != size:
            return f"{path / name} has {found} bytes, its manifest.json says {size}"
    return "; ".join(wrong_digests(path, without_shards(manifest)))


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """File name -> size in bytes and SHA-256 of a checkpoint. Raises OSError or ValueError where it cannot be read, or
    names a file that no checkpoint has: it may come from elsewhere, and its names lead to what is read and copied."""
    text = read_text(path / "manifest.json")
    content = parse_json(text)
    if text != as_json(content):  # a space more, a byte less at the end
        raise ValueError("it is not as it was written")
    try:
        manifest = {name: (entry["bytes"], entry["sha256"]) for name, entry in content.items()}
        # In the place of a file's own entry, where former versions, which know no such file, do not look.
        if INDEX_OF in content and (index := content[INDEX_OF].get(INDEX_ENTRY)) is not None:
            if INDEX in manifest:
                raise ValueError(f"it names {INDEX} twice")
            manifest[INDEX] = index["bytes"], index["sha256"]
        entries = [*content.values(), *([content[INDEX_OF][INDEX_ENTRY]] if INDEX in manifest else [])]
        fields = {field for entry in entries for field in entry} - ({INDEX_ENTRY} if INDEX in manifest else set())
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it lacks sizes or digests ({error!r})") from None
    if odd := fields - {"bytes", "sha256"}:
        raise ValueError(f"it says {min(odd)!r} of a file, which this version does not know")
    for name, (size, digest) in manifest.items():
        if name not in (*SMALL_FILES, INDEX) and not _is_shard(name):
            raise ValueError(f"it names {name!r}, which is no file of a checkpoint")
        if type(size) is not int or size < 0:
            raise ValueError(f"the size of {name} is {size!r}")
        if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"the SHA-256 of {name} is {digest!r}")
    return manifest


def _is_shard(name: str) -> bool:
    return re.fullmatch(r"shard_[0-9]+\.safetensors", name) is not None


def without_shards(entries: Mapping[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """The entries of a manifest for the small files beside the shards."""
    return {name: entry for name, entry in entries.items() if not _is_shard(name)}


def wrong_digests(path: Path, entries: Mapping[str, tuple[int, str]]) -> list[str]:
    """What is wrong with the content of these files of a checkpoint, which the manifest gives sizes and digests."""

    def fault(name: str) -> str:
        try:
            right = sha256(path / name) == entries[name][1]
        except OSError as error:
            return str(error)
        return "" if right else wrong_digest(path / name)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return [found for found in threads.map(fault, entries) if found]


def wrong_digest(file: Path) -> str:
    """What is said of a file that is not what was saved."""
    return f"{file}: the SHA-256 is not the one in manifest.json: the file is damaged"


def index_source(path: Path) -> tuple[str, dict[str, int]] | None:
    """What `TensorIndex.read` makes the index of a checkpoint of; None: it has none. Raises Damaged where the text is
    not what was saved."""
    if not (path / "manifest.json").is_file():
        return None
    manifest = read_manifest(path)
    if INDEX not in manifest:
        return None
    if wrong := wrong_digests(path, {INDEX: manifest[INDEX]}):
        raise Damaged(wrong[0])
    return read_text(path / INDEX, MOST_INDEX), {name: size for name, (size, _) in manifest.items() if _is_shard(name)}


def read_index(path: Path) -> TensorIndex | None:
    """The index of a checkpoint; None: it has none. Raises Damaged or ValueError where it is not what it should be."""
    source = index_source(path)
    with blaming(str(path / INDEX)):
        return None if source is None else TensorIndex.read(*source)


def read_state(path: Path, model: DataclassInstance, but_for: Collection[str] = ()) -> TrainState:
    """The state in a checkpoint. Raises ValueError where its model differs from `model` in a field that `but_for` does
    not have, naming the field."""
    content = read_json(path / "state.json")
    if content.get("format") != FORMAT:
        raise ValueError(f"checkpoint.resume: {path} has format {content.get('format')}, this version reads {FORMAT}")
    theirs = content.get("model")
    for field in fields(model):
        # A field that came after the checkpoint has the value that leaves everything as it was.
        written = theirs.get(field.name, field.default) if isinstance(theirs, dict) else None
        if written != (value := getattr(model, field.name)) and field.name not in but_for:
            resampled = isinstance(model, ModelConfig) and field.name == "image_size"
            raise ValueError(
                f"checkpoint.resume: {path} was trained with model.{field.name}={written}, "
                f"this run has {value}: use its config, or another `out` to start anew"
                + (", or go on at another resolution by --checkpoint.other_resolution true" if resampled else "")
            )
    try:
        return _train_state(content)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"checkpoint.resume: {path / 'state.json'} is no state of a run: {error!r}") from None


def _train_state(content: dict[str, Any]) -> TrainState:
    """Raises ValueError, TypeError or KeyError where it is none."""
    values = {field.name: content[field.name] for field in fields(TrainState) if field.name in content}
    consumed = content["consumed"]
    if isinstance(consumed, list):  # by a former version, which had these three streams
        consumed = dict(zip(("images", "texts", "pairs"), consumed, strict=True))
    state = TrainState(**values | {"step": content["step"], "consumed": dict(consumed)})
    counts = (state.step, *state.consumed.values(), state.bad_samples, state.skipped_steps)
    if not all(type(count) is int for count in (*counts, *chain(*state.readers))) or min(counts) < 0:
        raise ValueError("its counts are not all whole numbers")
    if not isinstance(state.sources, dict):
        raise ValueError("its sources are not told by field")
    return state


# --------------------------------------------------------------------------------------- with all ranks of the run


def verified(path: Path | None, resume: str, folder: Path) -> Path | None:
    """The checkpoint to go on from, after the ranks have read all of it, each a share of its files. Collective.

    `path`: what `find` chose. Where a digest is wrong, `auto` goes on to the newest whole checkpoint before it; else
    every rank raises Damaged with the file's name. Nothing has been changed by then.
    """
    _assert_seen_by_all(path)
    damages: list[str] = []
    while path is not None:
        found: list[str] = sum(gather_objects(wrong_digests(path, _share_of_shards(path))), [])
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


def _share_of_shards(path: Path) -> dict[str, tuple[int, str]]:
    """This rank's share of the entries of a manifest, which the first one reads. Collective."""
    world = dist.get_world_size()
    shares: list[Any] | None = None
    if dist.get_rank() == 0:
        entries = sorted((name, entry) for name, entry in read_manifest(path).items() if _is_shard(name))
        shares = [dict(entries[rank::world]) for rank in range(world)]
    return scatter_objects(shares)


def _assert_seen_by_all(path: Path | None) -> None:
    """Raises Damaged where the ranks do not see the same checkpoint: on a disk of one node, for example."""
    seen = gather_objects(str(path))
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise Damaged(
                f"checkpoint.resume: rank 0 finds {seen[0]}, rank {rank} finds {other}: "
                "`out` must be on a file system that all nodes share"
            )
