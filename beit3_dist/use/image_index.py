"""The vectors of a folder's images, kept in the cache between searches, and the best matches for some words."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from beit3_dist.checkpoint.find import checkpoint_of
from beit3_dist.checkpoint.model_folder import WEIGHTS, model_in
from beit3_dist.data.cache import cache_folder, digest, locked, write_whole
from beit3_dist.data.kinds import LeftOut, images_below
from beit3_dist.data.transforms import resized
from beit3_dist.inference import IMAGES_AT_ONCE, Model, open_image
from beit3_dist.opening import parse_json, regular_size

FORMAT = 1
"""Version of the index files; a change makes every one stale."""
PROGRESS_SECONDS = 5
SIDE = 192
"""Longest side of a match's small image, in pixels."""

Tell = Callable[[str], None]
"""Shows a line to the user."""


@dataclass
class Index:
    """The images of a folder, by their paths below it."""

    files: dict[str, tuple[int, ...]]
    """Size and time of the last change, in nanoseconds."""
    vectors: dict[str, np.ndarray]
    """float32 [D], unit vectors."""
    unreadable: dict[str, str]
    """Why a file is no image."""


def index_file(folder: Path, model: Path, cache: str) -> Path:
    """Where the index of a folder under a model is kept: one file for each two."""
    of_folder = model_in(model) / WEIGHTS
    weights = (of_folder if of_folder.is_file() else checkpoint_of(model) / "manifest.json").stat()
    parts = (FORMAT, folder.resolve(), model.resolve(), weights.st_size, weights.st_mtime_ns)
    place = cache_folder(cache, "--cache") / "search"
    place.mkdir(exist_ok=True)
    return place / f"{digest(*parts)}.npz"


def checked(notes: Any, vectors: np.ndarray, width: int) -> Index:
    """The index in a file's notes and vectors, float32 [images, width]. Raises nearly anything where it is none, so
    that nothing is shown that is not among the images."""
    files = {name: tuple(mark) for name, mark in notes["files"].items()}
    seen, unreadable = notes["seen"], notes["unreadable"]
    if not all(type(number) is int for file in files.values() for number in file):
        raise ValueError("sizes and times are not all whole numbers")
    if sorted([*seen, *unreadable]) != sorted(files) or not all(isinstance(why, str) for why in unreadable.values()):
        raise ValueError("what was seen and what was not are not the files")
    if len(vectors) and vectors.shape[1:] != (width,) or vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise ValueError("its vectors are not the model's")
    return Index(files, dict(zip(seen, vectors, strict=True)), unreadable)


def read_index(file: Path, width: int, tell: Tell) -> Index:
    """The index of an earlier search; an empty one where there is none, or none that can be read. `width`: of the
    model's vectors."""
    try:
        size = regular_size(file)
        with zipfile.ZipFile(file) as archive:  # nothing in it is packed
            if sum(record.file_size for record in archive.infolist()) > size:
                raise ValueError("it would unpack to more than the file")
        with np.load(file, allow_pickle=False) as content:
            return checked(parse_json(content["notes"].tobytes().decode()), content["vectors"], width)
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged file makes numpy raise nearly anything; it is derived, so it is made anew
        tell(f"{file} is damaged ({type(error).__name__}) and made anew")
    return Index({}, {}, {})


def write_index(file: Path, index: Index) -> None:
    notes = {"files": index.files, "seen": list(index.vectors), "unreadable": index.unreadable}
    vectors = np.stack(list(index.vectors.values())) if index.vectors else np.zeros((0, 0), dtype=np.float32)
    marks = np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)
    write_whole(file, lambda out: np.savez(out, notes=marks, vectors=vectors), "--cache")


def reason_of(error: OSError | ValueError, path: Path) -> str:
    """What is wrong with a file, without its name."""
    known = error.strerror if isinstance(error, OSError) else None
    return known or str(error).removeprefix(f"{path}: ")


def update(index: Index, folder: Path, model: Model, left_out: LeftOut, tell: Tell) -> int:
    """Brings the index up to date, batch by batch; the number of files that had to be read. What is no image is
    counted."""
    found = ((os.path.relpath(path, folder), path.stat()) for path in images_below(folder, left_out))
    now = {name: (status.st_size, status.st_mtime_ns) for name, status in found}
    for name in [name for name, file in index.files.items() if now.get(name) != file]:
        del index.files[name]
        index.vectors.pop(name, None)
        index.unreadable.pop(name, None)
    fresh = [name for name in now if name not in index.files]
    said = time.monotonic()
    for first in range(0, len(fresh), IMAGES_AT_ONCE):
        names = fresh[first : first + IMAGES_AT_ONCE]
        views, reasons = {}, {}
        for name in names:
            try:  # only the small view is kept: 32 opened images may be gigabytes
                views[name] = resized(open_image(folder / name), model.network.config.image_size)
            except (OSError, ValueError) as error:
                reasons[name] = reason_of(error, folder / name)
        vectors = model.embed_images(list(views.values())).numpy()
        index.vectors.update(zip(views, vectors, strict=True))
        index.unreadable.update(reasons)
        index.files.update({name: now[name] for name in names})
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            tell(f"{first + len(names)} of {len(fresh)} new images are read")
    return len(fresh)


class Match(NamedTuple):
    name: str
    score: float
    """Cosine of the angle between its vector and the words'."""
    small: Image.Image


def best(index: Index, words: Tensor, folder: Path, top: int) -> list[Match]:
    """The `top` images nearest to the vector of the words [D], best first."""
    names = list(index.vectors)
    scores = np.stack([index.vectors[name] for name in names]) @ words.numpy()
    matches: list[Match] = []
    for place in np.argsort(-scores, kind="stable"):
        if len(matches) == top:
            break
        try:
            small = open_image(folder / names[place])
        except (OSError, ValueError) as error:  # it changed since it was looked at
            index.unreadable[names[place]] = reason_of(error, folder / names[place])
            continue
        small.thumbnail((SIDE, SIDE))
        matches.append(Match(names[place], float(scores[place]), small))
    return matches


def brought_up_to_date(
    folder: Path, model: Model, path: Path, cache: str, left_out: LeftOut, tell: Tell
) -> tuple[Index, int]:
    """The index of a folder's images under the model of `path`, and how many had to be read. What is no image is
    counted. An interruption keeps what was read."""
    file = index_file(folder, path, cache)
    with locked(file, "--cache"):
        index = read_index(file, len(model.embed_texts(["a"])[0]), tell)
        before = dict(index.files)
        try:
            fresh = update(index, folder, model, left_out, tell)
        finally:
            if index.files != before:
                write_index(file, index)
    return index, fresh
