"""Visual codes computed once and kept, by sample id, for runs that see the same views again.

A view is a function of (seed, stream, epoch, index), so the codes of a run's crops can be computed before it, and the
held-out images' anyway. A folder of codes:

    ids.npy         int64 [n], sorted: sample ids, of images alone and of pairs alike
    rows.npy        int64 [n]: where in codes.bin the codes of each id lie
    codes.bin       uint16 [rows, patches]: codes in the order in which a run needs them, which lie near each other then
    manifest.json   what the codes were made from, how far they reach, and every file's size; written last

tools/precompute_codes.py writes it; `image_codes` and `eval.image_codes` of a run's config name it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit3_dist.checkpoint.files import folder_made_aside, sha256, write_json
from beit3_dist.config import Patterns, RunConfig, require, sources_of
from beit3_dist.data.batch import MicroBatch, MixedBatches
from beit3_dist.data.streams import SampleStream
from beit3_dist.data.views import Codes, Tokenize
from beit3_dist.looking import of_node
from beit3_dist.opening import read_json, regular_size

FORMAT = 2
CODE_TYPE = np.dtype("<u2")
MOST_CODES = 65_535
FILES = ("ids.npy", "rows.npy", "codes.bin")


DRAWN_BY = ("max_pixels", "min_crop_scale", "scaled_decoding", "color_jitter", "horizontal_flip")
"""Fields of `data` that a view depends on."""
FORMERLY = {"data.scaled_decoding": False}
"""What a folder was made with that does not say it: its version knew nothing else."""


def made_from(config: RunConfig, view: int, held_out: bool, batches: MixedBatches) -> dict[str, Any]:
    """Everything that a view and its codes depend on, by the config's names."""
    shards = config.eval if held_out else config.data
    return {
        "part": "held-out views" if held_out else "training views",
        "image_tokenizer": sha256(Path(config.image_tokenizer)),
        "view": view,
        "seed": config.seed,
        **{
            s.field: sources_digest(batches.indexed(s), getattr(shards, s.field))
            for s in batches.streams
            if s.has_images
        },
        **{f"data.{name}": getattr(config.data, name) for name in DRAWN_BY},
        **({} if held_out else {"data.shuffle": config.data.shuffled_by}),  # which images come before the last step
    }


def sources_digest(stream: SampleStream, shards: Patterns) -> str:
    """Digest of the weights of a stream's sources and of their shards' names and sizes, wherever they lie."""
    weights = [source.weight for source in sources_of(shards, "data")]
    return hashlib.sha256(json.dumps([weights, stream.names_and_sizes()]).encode()).hexdigest()


def positions_taken(config: RunConfig, held_out: bool) -> tuple[int, int]:
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
    codes = PrecomputedCodes(Path(folder), field, config.model.visual_vocab_size)
    made = of_node(lambda: made_from(config, tokenizer_view, held_out, batches))
    codes.check(made, positions_taken(config, held_out))
    return codes


def write_codes(
    folder: Path, coded: Iterable[tuple[Tensor, Tensor]], made: dict[str, Any], taken: tuple[int, int]
) -> int:
    """Writes a new folder, whole or not at all, of codes as they come: ids int64 [n] of images, codes [n, patches].
    `taken`: the positions of images and pairs that are covered. Returns the number of ids, which stay in memory, 8
    bytes an image, until they are sorted at the end. Raises ValueError where the folder is in use."""
    of_images: list[np.ndarray] = []
    with folder_made_aside(folder) as partial:
        with open(partial / "codes.bin", "wb") as file:
            for some, codes in coded:
                of_images.append(some.numpy().copy())  # they may lie in a loader's memory, which is an open file
                require(int(codes.max()) <= MOST_CODES, f"a code above {MOST_CODES} does not fit into two bytes")
                file.write(codes.cpu().numpy().astype(CODE_TYPE).tobytes())
        require(bool(of_images), "the recipe takes no images, so there are no codes")
        ids, rows = np.unique(np.concatenate(of_images), return_index=True)  # a short stream starts over
        np.save(partial / "ids.npy", ids, allow_pickle=False)
        np.save(partial / "rows.npy", rows.astype(np.int64), allow_pickle=False)
        manifest = {
            "format": FORMAT,
            "made_from": made,
            "pictures": taken,
            "patches": codes.shape[1],
            "files": {name: (partial / name).stat().st_size for name in FILES},
        }
        write_json(partial / "manifest.json", manifest)
    return len(ids)


class PrecomputedCodes:
    """Codes by sample id, memory-mapped: pages are read when they are needed, and shared by a machine's processes."""

    def __init__(self, folder: Path, field: str, vocab_size: int) -> None:
        """`vocab_size`: codes of the image tokenizer. Raises ValueError naming `field` where the folder is not
        whole."""
        self.folder, self.field, self.vocab_size = folder, field, vocab_size
        try:
            self._open()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(
                f"{field}: {folder} is no whole folder of codes ({error}); tools/precompute_codes.py makes one"
            ) from error

    def _open(self) -> None:
        """Raises whatever a folder of something else leads to. The ids and codes themselves are not looked at."""
        self.manifest = read_json(self.folder / "manifest.json")
        found = self.manifest["format"]
        require(found == FORMAT, f"it has format {found}, not {FORMAT}")
        for name in FILES:
            size, said = regular_size(self.folder / name), self.manifest["files"][name]
            require(size == said, f"{name} has {size} bytes, its manifest says {said}")
        self.ids, self.rows = (
            np.load(self.folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for name in ("ids.npy", "rows.npy")
        )
        require(
            self.ids.dtype == self.rows.dtype == np.int64 and self.ids.shape == self.rows.shape == (len(self.ids),),
            "ids.npy and rows.npy are not two equally long rows of int64 numbers",
        )
        patches = self.manifest["patches"]
        require(type(patches) is int and patches > 0, f"its manifest says patches={patches!r}")
        self.codes = np.memmap(self.folder / "codes.bin", CODE_TYPE, "r").view(np.ndarray).reshape(-1, patches)
        require(len(self.ids) > 0 and isinstance(self.manifest["made_from"], dict), "it tells of no images")
        images, pairs = self.manifest["pictures"]
        require(type(images) is type(pairs) is int, f"its manifest says pictures={[images, pairs]}")

    def check(self, made: dict[str, Any], taken: tuple[int, int]) -> None:
        """Raises ValueError unless the codes are of these views and reach so many positions of images and pairs."""
        again = "; make it anew with tools/precompute_codes.py"
        for name, value in made.items():
            kept = self.manifest["made_from"].get(name, FORMERLY.get(name))
            require(
                kept == value, f"{self.field}: {self.folder} was made with {name}={kept}, this run has {value}{again}"
            )
        for name, covered, needed in zip(("images", "pairs"), self.manifest["pictures"], taken, strict=True):
            require(
                needed <= covered,
                f"{self.field}: {self.folder} covers {covered} {name}, this run takes {needed}{again}",
            )

    def of(self, batch: MicroBatch) -> Tensor:
        """int64 [I + P, patches]: the codes of a micro-batch's images. KeyError for an unknown image."""
        wanted = image_ids(batch).numpy()
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        missing = np.count_nonzero(self.ids[places] != wanted)
        if missing:
            raise KeyError(f"{self.folder} has no codes of {missing} images of this batch")
        rows = self.rows[places]
        in_file = bool(((0 <= rows) & (rows < len(self.codes))).all())
        codes = self.codes[rows].astype(np.int64) if in_file else np.empty(0)
        require(
            in_file and (not len(codes) or codes.max() < self.vocab_size),
            f"{self.field}: {self.folder} is damaged: it leads to rows or codes that are not there",
        )
        return torch.from_numpy(codes)


def image_ids(batch: MicroBatch) -> Tensor:
    """int64 [I]: ids of the samples with images."""
    return torch.cat([samples.ids for samples in batch.with_images])


def targets_of(batch: MicroBatch, codes: PrecomputedCodes | None, tokenize: Tokenize | None) -> Codes | None:
    """The precomputed codes of a micro-batch's images where there are any, else `tokenize`, which makes them; None on a
    pipeline stage that needs no targets."""
    return tokenize if codes is None or tokenize is None else codes.of(batch)
