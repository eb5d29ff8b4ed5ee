"""The neutral form, of no layout, of a training checkpoint: one entry per canonical parameter.

    FOLDER/
        shard_00000.safetensors   NAME: the fp32 master weight, NAME/exp_avg, ...: the optimizer's moments
        state.json, config.yaml   as in the checkpoint
        manifest.json             size and SHA-256 of every file above

Every entry is a whole parameter, flattened in the order of its elements, and the parameters stand in the order of their
names: the same training state gives the same bytes, whatever layout it was saved in. Shapes stand in the header under
`fragments`. The folder is itself a checkpoint (see store.py), whose shards are whole parameters: training resumes from
it in any layout, and a checkpoint of any layout turns into it. The file is written as a stream, so memory stays within
a few buffers however large the model.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.checkpoint.files import folder_made_aside, sync, write_json
from beit3_dist.checkpoint.find import SMALL_FILES, Damaged, damaged, read_manifest, wrong_digests
from beit3_dist.checkpoint.read import BUFFER, StoredShards
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.snapshot import shard_header

_SHARD = "shard_00000.safetensors"


def write_neutral(checkpoint: Path, folder: Path) -> None:
    """Writes the neutral form of a checkpoint into a new folder, whole or not at all.

    Raises ValueError where the checkpoint is damaged or incomplete, naming the file, or where the folder exists.
    """
    if damage := damaged(checkpoint):
        raise Damaged(damage)
    files = read_manifest(checkpoint)
    if wrong := wrong_digests(checkpoint, files):
        raise Damaged("; ".join(wrong))
    with folder_made_aside(folder) as partial:
        manifest = {_SHARD: _write_shard(partial / _SHARD, checkpoint)}
        for name, (size, digest) in files.items():
            if name in SMALL_FILES:
                shutil.copyfile(checkpoint / name, partial / name)
                sync(partial / name)
                manifest[name] = {"bytes": size, "sha256": digest}
        write_json(partial / "manifest.json", manifest)


def _write_shard(path: Path, checkpoint: Path) -> dict[str, Any]:
    """Streams a checkpoint's parameters into one safetensors file. Returns its entry of the manifest."""
    stored = StoredShards(checkpoint)
    whole = [Shard(name, stored.shape(name), 0, {}) for name in sorted(stored.names)]
    entries = [(shard.name, suffix, shard.shape) for shard in whole for suffix in sorted(stored.suffixes(shard.name))]
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(content: Any) -> None:
            digest.update(content)
            file.write(content)

        write(shard_header(whole, {name + suffix: math.prod(shape) for name, suffix, shape in entries}))
        for name, suffix, shape in entries:
            for values in _stream(stored, name, shape, suffix):
                write(values.numpy())
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _stream(stored: StoredShards, name: str, shape: tuple[int, ...], suffix: str) -> Iterator[Tensor]:
    """The elements of a whole parameter (or moment) in order, float32, BUFFER at a time."""
    numel = math.prod(shape)
    for start in range(0, numel, BUFFER):
        values = torch.empty(min(BUFFER, numel - start))
        stored.fill(values, Shard(name, shape, start, {suffix: values}), suffix)
        yield values
