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
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from beit3_dist.command_line import refusing
from beit3_dist.config import require
from beit3_dist.data.cache import write_whole
from beit3_dist.data.kinds import IMAGE_EXTENSIONS, LeftOut, told
from beit3_dist.inference import Model
from beit3_dist.use.image_index import SIDE, Index, Match, best, brought_up_to_date

PROGRAM = "search_images.py"
COLUMNS, MARGIN, LINE = 6, 12, 18
"""The sheet: images in a row, space around each, height of a line of text; in pixels."""


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
        left_out: LeftOut = {}
        index, fresh = brought_up_to_date(options.folder, model, options.model, options.cache, left_out, tell)
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
