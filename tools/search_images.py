#!/usr/bin/env python3
"""Finds images by words: the best matches of a folder, as a page and a sheet.

    python tools/search_images.py FOLDER "a red circle" --model MODEL [--top 24] [--out matches.html]

MODEL is a model folder fine-tuned for retrieval. Writes matches.html, which holds its small images itself and links
to the large ones, and matches.png, the same as one picture. Folders below FOLDER are searched too, through links as
well, each once; names that begin with a dot are not. Nothing is written into FOLDER: the images' vectors are kept in
--cache, so that a second search looks at new and changed images only. What cannot be read is listed on the page.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import sys
import time
import zipfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from beit3_dist.command_line import refusing
from beit3_dist.config import require
from beit3_dist.data.cache import cache_folder, digest, locked, write_whole
from beit3_dist.data.kinds import IMAGE_EXTENSIONS, LeftOut, images_below, told
from beit3_dist.data.transforms import resized
from beit3_dist.inference import IMAGES_AT_ONCE, Model, open_image
from beit3_dist.opening import parse_json, regular_size

PROGRAM = "search_images.py"
FORMAT = 1
"""Version of the index files; a change makes every one stale."""
PROGRESS_SECONDS = 5
SIDE = 192
COLUMNS, MARGIN, LINE = 6, 12, 18
"""The sheet: images in a row, space around each, height of a line of text; in pixels."""


# ------------------------------------------------------------------------------------------------------------- index


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
    weights = (model / "model.safetensors").stat()
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


def read_index(file: Path, width: int) -> Index:
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


def update(index: Index, folder: Path, model: Model, left_out: LeftOut) -> int:
    """Brings the index up to date, batch by batch; the number of files that had to be read. What is no image is
    counted."""
    found = ((os.path.relpath(path, folder), path.stat()) for path in images_below(folder, left_out))
    now = {name: (status.st_size, status.st_mtime_ns) for name, status in found}
    for name in [name for name, file in index.files.items() if now.get(name) != file]:
        del index.files[name]
        index.vectors.pop(name, None)
        index.unreadable.pop(name, None)
    fresh = [name for name in now if name not in index.files]
    told = time.monotonic()
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
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            tell(f"{first + len(names)} of {len(fresh)} new images are read")
    return len(fresh)


# ------------------------------------------------------------------------------------------------------------- search


class Match(NamedTuple):
    name: str
    score: float
    """Cosine of the angle between its vector and the words'."""
    small: Image.Image


def best(index: Index, words: torch.Tensor, folder: Path, top: int) -> list[Match]:
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


def printable(name: str) -> str:
    """A file's name with a ? for what is no printable character."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; }
p, summary { opacity: .7; }
ol { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); list-style: none;
     padding: 0; }
ol li { border: 1px solid #8884; border-radius: 8px; overflow: hidden; }
ol a { align-items: center; background: #8881; display: flex; height: 13rem; justify-content: center; }
figure { margin: 0; }
figcaption { overflow-wrap: anywhere; padding: .5rem .7rem; }
b { font-variant-numeric: tabular-nums; margin-right: .5em; }
"""


def page(words: str, folder: Path, matches: list[Match], index: Index) -> str:
    """The matches as one HTML file that needs no other: no script, no outside address but links to the images."""
    figures = []
    for name, score, small in matches:
        data = io.BytesIO()
        small.save(data, "JPEG", quality=88)
        source = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
        link, shown = html.escape((folder / name).resolve().as_uri()), html.escape(printable(name))
        figures.append(
            f'<li><figure><a href="{link}"><img src="{source}" alt="{shown}" width="{small.width}" '
            f'height="{small.height}"></a><figcaption><b>{score:.3f}</b>{shown}</figcaption></figure></li>'
        )
    faults = "".join(
        f"<li>{html.escape(printable(name))}: {html.escape(printable(reason))}</li>"
        for name, reason in sorted(index.unreadable.items())
    )
    summary = f"<summary>{len(index.unreadable)} files could not be read</summary>"
    listed = f"<details>{summary}<ul>{faults}</ul></details>" if faults else ""
    title, searched = html.escape(printable(words)), html.escape(printable(str(folder)))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>
<body><h1>{title}</h1><p>the {len(matches)} best of {len(index.vectors)} images in {searched}</p>
<ol>
{chr(10).join(figures)}
</ol>
{listed}
</body></html>
"""


def sheet(words: str, matches: list[Match]) -> Image.Image:
    """The matches as one picture, best first, row by row."""
    columns, cell, font = min(COLUMNS, len(matches)), SIDE + 2 * MARGIN, ImageFont.load_default(14)
    rows, header = -(-len(matches) // columns), LINE + 2 * MARGIN
    picture = Image.new("RGB", (columns * cell, header + rows * (cell + 2 * LINE)), "white")
    draw = ImageDraw.Draw(picture)

    def write(x: int, y: int, text: str, width: int) -> None:
        while draw.textlength(text, font) > width:
            text = text[:-2] + "…"
        draw.text((x, y), text, "black", font)

    write(MARGIN, MARGIN, printable(words), picture.width - 2 * MARGIN)
    for number, (name, score, small) in enumerate(matches):
        x, y = number % columns * cell, header + number // columns * (cell + 2 * LINE)
        picture.paste(small, (x + (cell - small.width) // 2, y + (cell - small.height) // 2))
        write(x + MARGIN, y + cell, f"{score:.3f}", SIDE)
        write(x + MARGIN, y + cell + LINE, printable(Path(name).name), SIDE)
    return picture


# ------------------------------------------------------------------------------------------------------- command line


def tell(line: str) -> None:
    print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images, in folders below it too")
    parser.add_argument("words", help="what to look for")
    parser.add_argument("--model", type=Path, required=True, help="model folder fine-tuned for retrieval")
    parser.add_argument("--top", type=int, default=24, help="images to show; 24")
    parser.add_argument("--out", type=Path, default=Path("matches.html"), metavar="HTML",
                        help="page to write; the sheet gets the same name with .png; matches.html")  # fmt: skip
    parser.add_argument("--cache", default="~/.cache/beit3_dist", help="folder of the index; ~/.cache/beit3_dist")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; the first GPU where there is one")
    options = parser.parse_args(arguments)
    require(options.folder.is_dir(), f"{options.folder} is no folder")
    require(bool(options.words.strip()), "there are no words to look for")
    require(options.top >= 1, f"--top {options.top} is not positive")
    require(options.out.suffix == ".html", f"--out {options.out} does not end in .html")
    root = options.folder.resolve()
    for name, path in (("--out", options.out), ("--cache", Path(options.cache).expanduser())):
        place = path.resolve()  # in a hidden folder no search ever sees it
        if place.is_relative_to(root) and not any(part.startswith(".") for part in place.relative_to(root).parts):
            raise ValueError(f"{name} {path} lies in {options.folder}: nothing is written among the images")
    return options


def main(arguments: list[str] | None = None) -> None:
    with refusing(PROGRAM):
        options = parse_arguments(arguments)
        model = Model.load(options.model, options.device)
        words = model.embed_texts([options.words])[0]
        file = index_file(options.folder, options.model, options.cache)
        left_out: LeftOut = {}
        with locked(file, "--cache"):
            index = read_index(file, model.network.config.width)
            before = dict(index.files)
            try:
                fresh = update(index, options.folder, model, left_out)
            finally:  # an interrupted search keeps what it has read
                if index.files != before:
                    write_index(file, index)
        require(bool(index.vectors), f"{options.folder} holds no readable image ({', '.join(IMAGE_EXTENSIONS)})")
        matches = best(index, words, options.folder, options.top)
        require(bool(matches), f"every image of {options.folder} vanished while it was searched")
        picture = options.out.with_suffix(".png")
        content = page(options.words, options.folder, matches, index).encode()
        write_whole(options.out, lambda out: out.write(content), "--out")
        write_whole(picture, lambda out: sheet(options.words, matches).save(out, "PNG"), "--out")
    for name, score, _ in matches:
        print(f"{score:.3f}  {printable(name)}")
    print(f"{options.out} and {picture.name}: {len(index.vectors)} images, {fresh} of them newly read")
    for line in told(left_out):
        tell(printable(line))
    if index.unreadable:
        tell(f"{len(index.unreadable)} files could not be read; {options.out} lists them")


if __name__ == "__main__":
    main()
