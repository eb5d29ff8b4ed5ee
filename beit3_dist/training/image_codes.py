"""Visual codes computed once and kept: shards of codes by sample id, for runs that see the same views again.

A view is a function of (seed, stream, epoch, index), so the codes of a run's crops can be computed before it, and the
held-out pictures' anyway. A folder of codes:

    00000.ids.npy     int64 [n], sorted: sample ids, pictures of images and pairs alike
    00000.codes.npy   uint16 [n, patches]: their codes, in the same order
    manifest.json     what the codes were made from, how far they reach, and every file's size; written last

tools/precompute_codes.py writes it; `image_codes` and `eval.image_codes` of a run's config name it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit3_dist.checkpoint.files import sha256, write_json
from beit3_dist.config import RunConfig, Source, require
from beit3_dist.data.batch import MicroBatch, MixedBatches
from beit3_dist.data.order import Stream
from beit3_dist.data.streams import SampleStream
from beit3_dist.training.inputs import Tokenize, views
from beit3_dist.training.sources import names_and_sizes, shuffle_of, weights_of

FORMAT = 1
MOST_CODES = 65_535
SHARD_ROWS = 100_000
"""Pictures of a code shard: 39 MB at 196 patches."""


DRAWN_BY = ("max_pixels", "min_crop_scale", "color_jitter", "horizontal_flip")
"""Fields of `data` that a view depends on."""


def made_from(config: RunConfig, view: int, held_out: bool, batches: MixedBatches) -> dict[str, Any]:
    """Everything that a view and its codes depend on, by the config's names."""
    shards = config.eval if held_out else config.data
    return {
        "part": "held-out views" if held_out else "training views",
        "image_tokenizer": sha256(Path(config.image_tokenizer)),
        "view": view,
        "seed": config.seed,
        "images": sources_digest(batches.indexed(Stream.IMAGES), shards.images),
        "pairs": sources_digest(batches.indexed(Stream.PAIRS), shards.pairs),
        **{f"data.{name}": getattr(config.data, name) for name in DRAWN_BY},
        **({} if held_out else {"data.shuffle": shuffle_of(config.data)}),  # which pictures come before the last step
    }


def sources_digest(stream: SampleStream, shards: str | list[Source]) -> str:
    """Digest of the weights of a stream's sources and of their shards' names and sizes, wherever they lie."""
    return hashlib.sha256(json.dumps([weights_of(shards), names_and_sizes(stream)]).encode()).hexdigest()


def pictures_of(config: RunConfig, held_out: bool) -> tuple[int, int]:
    """Positions of images and pairs that a run takes: those of all its steps, or of one validation."""
    steps = config.eval.batches if held_out else config.steps
    return steps * config.batch.images, steps * config.batch.pairs


def open_codes(
    config: RunConfig, tokenizer_view: int, held_out: bool, batches: MixedBatches
) -> PrecomputedCodes | None:
    """The precomputed codes that the config names for these batches, checked; None where it names none."""
    folder, field = (config.eval.image_codes, "eval.image_codes") if held_out else (config.image_codes, "image_codes")
    if not folder:
        return None
    codes = PrecomputedCodes(Path(folder), field)
    codes.check(made_from(config, tokenizer_view, held_out, batches), pictures_of(config, held_out))
    return codes


class CodesWriter:
    """Collects codes by id and writes the folder, which is whole or absent. Raises ValueError if it exists."""

    def __init__(self, folder: Path) -> None:
        require(not folder.exists(), f"{folder} already exists; remove it or name another folder")
        self.folder, self.partial = folder, folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self.ids: list[np.ndarray] = []
        self.codes: list[np.ndarray] = []
        self.files: list[str] = []
        self.written = 0

    def add(self, ids: Tensor, codes: Tensor) -> None:
        """ids int64 [n] of pictures with codes [n, patches]."""
        self.ids.append(ids.numpy())
        require(int(codes.max()) <= MOST_CODES, f"a code above {MOST_CODES} does not fit into two bytes")
        self.codes.append(codes.cpu().numpy().astype(np.uint16))
        if sum(map(len, self.ids)) >= SHARD_ROWS:
            self._flush()

    def close(self, made: dict[str, Any], pictures: tuple[int, int]) -> int:
        """Writes the rest and the manifest; `pictures`: the positions of images and pairs that are covered."""
        if self.ids:
            self._flush()
        files = {name: (self.partial / name).stat().st_size for name in self.files}
        write_json(
            self.partial / "manifest.json", {"format": FORMAT, "made_from": made, "pictures": pictures, "files": files}
        )
        self.partial.rename(self.folder)
        return self.written

    def _flush(self) -> None:
        ids, first = np.unique(np.concatenate(self.ids), return_index=True)  # a short stream starts over
        number = len(self.files) // 2
        for name, values in (("ids", ids), ("codes", np.concatenate(self.codes)[first])):
            self.files.append(f"{number:05d}.{name}.npy")
            np.save(self.partial / self.files[-1], values, allow_pickle=False)
        self.written += len(ids)
        self.ids, self.codes = [], []


class PrecomputedCodes:
    """Codes by sample id, memory-mapped."""

    def __init__(self, folder: Path, field: str) -> None:
        """Raises ValueError naming `field` where the folder is not whole."""
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text())
            for name, size in self.manifest["files"].items():
                found = (folder / name).stat().st_size
                require(found == size, f"{name} has {found} bytes, its manifest says {size}")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{field}: {folder} is no whole folder of codes ({error}); tools/precompute_codes.py makes one"
            ) from error
        self.folder, self.field = folder, field
        numbers = range(len(self.manifest["files"]) // 2)
        self.shards = [
            tuple(
                np.load(folder / f"{n:05d}.{part}.npy", mmap_mode="r", allow_pickle=False) for part in ("ids", "codes")
            )
            for n in numbers
        ]

    def check(self, made: dict[str, Any], pictures: tuple[int, int]) -> None:
        """Raises ValueError unless the codes are of these views and reach so many positions of images and pairs."""
        again = "; make it anew with tools/precompute_codes.py"
        for name, value in made.items():
            kept = self.manifest["made_from"].get(name)
            require(
                kept == value, f"{self.field}: {self.folder} was made with {name}={kept}, this run has {value}{again}"
            )
        for name, covered, needed in zip(("images", "pairs"), self.manifest["pictures"], pictures, strict=True):
            require(
                needed <= covered,
                f"{self.field}: {self.folder} covers {covered} {name}, this run takes {needed}{again}",
            )

    def of(self, batch: MicroBatch) -> Tensor:
        """int64 [I + P, patches]: the codes of a micro-batch's pictures. KeyError for an unknown picture."""
        wanted = batch.sample_ids[: len(batch.images)].numpy()
        found: np.ndarray | None = None
        missing = np.ones(len(wanted), dtype=bool)
        for ids, codes in self.shards:
            places = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
            here = missing & (ids[places] == wanted)
            if found is None:
                found = np.zeros((len(wanted), codes.shape[1]), dtype=np.int64)
            found[here] = codes[places[here]]
            missing &= ~here
        if found is None or missing.any():
            raise KeyError(f"{self.folder} has no codes of {missing.sum()} pictures of this batch")
        return torch.from_numpy(found)


def mapped(file: Path) -> np.ndarray:
    """An array whose pages are read when they are needed, and shared by the processes of a machine."""
    return np.load(file, mmap_mode="r", allow_pickle=False)


def targets_of(batch: MicroBatch, codes: PrecomputedCodes | None, tokenize: Tokenize | None) -> Tokenize | None:
    """What gives the codes of a micro-batch's pictures: the precomputed ones where there are any, else `tokenize`; None
    on a pipeline stage that needs no targets."""
    if codes is None or tokenize is None:
        return tokenize
    looked_up = codes.of(batch)
    return lambda pictures: looked_up.to(pictures.device, non_blocking=True)


def write_codes(writer: CodesWriter, batches: Iterable[MicroBatch], tokenize: Tokenize, device: torch.device) -> None:
    """Adds the codes of all pictures of the micro-batches."""
    for batch in batches:
        _, pictures = views(batch, device)
        writer.add(batch.sample_ids[: len(pictures)], tokenize(pictures))
