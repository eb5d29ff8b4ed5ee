"""A card of shards: how many and how large, what is in them, what is there twice, and some of it to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from beit3_dist.data.duplicates import Found
from beit3_dist.data.faults import BadSample
from beit3_dist.data.kinds import IMAGE, JSON, TXT
from beit3_dist.data.members import members_of
from beit3_dist.data.tars import Tar
from beit3_dist.data.transforms import decode
from beit3_dist.opening import one_line

SIDES = (0, 64, 128, 224, 384, 512, 768, 1024)
"""Pixels of a picture's shorter side: where the bars of the histogram begin."""
WORDS = (0, 1, 4, 8, 16, 32, 64, 128, 256, 512)
"""Words of a text, likewise."""
LANGUAGES = 12
"""Those that are named; the others are one line."""
EXAMPLES, PAIRS = 12, 6
"""Pictures that are shown, and pairs of alike ones."""
SHOWN = 112
"""Pixels of a picture's longer side."""
LONGEST = 120
"""Letters of a text or a key that are shown."""
STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color-scheme:light dark}"
    "td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}"
    "figure{display:inline-block;margin:.4em;width:7.5em;vertical-align:top;font-size:12px;overflow-wrap:anywhere}"
    "img{max-width:100%}"
)


def facts_of(found: Found) -> dict[str, Any]:
    """What a card says of a stream beside its counts, as JSON can hold it."""
    facts, first = found.facts, found.held_out
    told: dict[str, Any] = {"held_out_samples": first, "duplicates": found.counts, "held_out_duplicates": found.leaks}
    told["left_out"] = len(found.duplicates())
    if len(facts.sizes) > first:
        sizes = facts.sizes[first:]
        shorter = sizes.min(1)
        told["pictures"] = {
            "count": len(sizes),
            "shorter_side": {
                "median": int(np.median(shorter)),
                "least": int(shorter.min()),
                "most": int(shorter.max()),
            },
            "shorter_sides": _histogram(shorter, SIDES),
            "megapixels": round(float(sizes.prod(1, dtype=np.int64).sum()) / 1e6, 1),
        }
    of_own = facts.text_of >= first
    if of_own.any():
        words = facts.words[of_own]
        told["texts"] = {
            "count": len(words),
            "words": int(words.sum()),
            "length": {name: float(np.percentile(words, q)) for name, q in (("5 %", 5), ("median", 50), ("95 %", 95))},
            "lengths": _histogram(words, WORDS),
            "languages": dict(facts.languages.most_common()),
            "languages_of": facts.languages.total(),
        }
    return told


def _histogram(values: np.ndarray, begins: tuple[int, ...]) -> dict[str, int]:
    """How many values lie from each of `begins` to before the next."""
    counts = np.histogram(values, [*begins, np.iinfo(np.int64).max])[0]
    names = [f"{a} to {b - 1}" if b - a > 1 else f"{a}" for a, b in zip(begins, begins[1:], strict=False)]
    return {name: int(count) for name, count in zip([*names, f"from {begins[-1]}"], counts, strict=True) if count}


class Shown:
    """A picture of a sample with its text, small."""

    def __init__(self, found: Found, number: int, files: dict[str, str], max_pixels: int) -> None:
        """`files`: shard -> its plain tar."""
        shard, key = found.place(number)
        self.key, self.text, self.jpeg = one_line(key, LONGEST), "", b""
        with Tar(files[shard], shard) as tar:
            places = dict(enumerate(members_of(tar).samples.get(key.encode(), [])))
            try:
                image = decode(tar.read(*places[IMAGE]), max_pixels)
            except (BadSample, KeyError):
                return
            text = next((tar.read(*places[kind]) for kind in (TXT, JSON) if places[kind][1] >= 0), b"")
        self.text = one_line(text[: 4 * LONGEST].decode("utf-8", "replace"), LONGEST)
        image.thumbnail((SHOWN, SHOWN))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        self.jpeg = file.getvalue()


def examples_of(found: Found, files: dict[str, str], max_pixels: int) -> tuple[list[Shown], list[tuple[Shown, Shown]]]:
    """Pictures at equal distances, and pairs of such as are alike. Each is read again from its shard."""

    def show(number: int) -> Shown:
        return Shown(found, number, files, max_pixels)

    if not len(found.facts.pictures):
        return [], []
    own, twice = len(found.like) - found.held_out, found.duplicates()
    places = (
        [found.held_out + own * n // EXAMPLES for n in range(EXAMPLES)]
        if own >= EXAMPLES
        else range(found.held_out, len(found.like))
    )
    pairs = twice[:: max(1, len(twice) // PAIRS)][:PAIRS].tolist()
    return [show(n) for n in places], [(show(n), show(int(found.like[n]))) for n in pairs]


def write_card(out: Path, streams: dict[str, dict[str, Any]], shown: dict[str, tuple[Any, Any]]) -> None:
    """A page of HTML that needs nothing beside it, or Markdown with its pictures in OUT.pictures/, by the name's
    ending. `streams`: what `facts_of` and the check say of each; `shown`: its examples."""
    parts = [part for name, told in streams.items() for part in _stream(name, told, *shown.get(name, ([], [])))]
    out.write_text(_html(parts) if out.suffix == ".html" else _markdown(parts, out), encoding="utf-8")


Part = tuple[str, Any]
"""heading and its text, table and its rows, or pictures."""


def _stream(name: str, told: dict[str, Any], examples: list[Shown], pairs: list[tuple[Shown, Shown]]) -> Iterator[Part]:
    problems = ", ".join(f"{count:,} {kind}" for kind, count in told["problems"].items()) or "none"
    yield "heading", name
    rows = [("shards", f"{told['shards']:,}"), ("samples", f"{told['samples']:,}")]
    if told["documents"]:
        rows.append(("documents", f"{told['documents']:,}"))
    rows += [("bytes", f"{told['bytes']:,}"), ("problems", problems)]
    if pictures := told.get("pictures"):
        side = pictures["shorter_side"]
        rows.append(("shorter side", f"{side['least']} to {side['most']} pixels, median {side['median']}"))
        rows.append(("pixels in all", f"{pictures['megapixels']:,} million"))
    if texts := told.get("texts"):
        length = ", ".join(f"{q} {value:.0f}" for q, value in texts["length"].items())
        rows += [("texts", f"{texts['count']:,} of {texts['words']:,} words"), ("words of a text", length)]
    for kind, what in (("duplicates", "of an earlier one"), ("held_out_duplicates", "of a held-out one")):
        rows += [(f"{reason} {what}", f"{count:,}") for reason, count in told[kind].items() if _asked(kind, told)]
    yield "table", rows
    for title, bars in (
        ("Shorter sides, in pixels", (pictures or {}).get("shorter_sides")),
        ("Words of a text", (texts or {}).get("lengths")),
        ("Languages, as py3langid guesses", _most((texts or {}).get("languages", {}))),
    ):
        if bars:
            whole = sum(bars.values())
            yield "title", title if "Lang" not in title else f"{title} of {whole:,} texts"
            yield "table", [(bar, f"{count:,}", f"{count / whole:.1%}") for bar, count in bars.items()]
    if examples:
        yield "title", "Examples"
        yield "pictures", examples
    if pairs:
        yield "title", "Pictures alike: the one that would be left out, and the one that stays"
        yield "pictures", [one for pair in pairs for one in pair]


def _asked(kind: str, told: dict[str, Any]) -> bool:
    return kind == "duplicates" or told["held_out_samples"] > 0


def _most(languages: dict[str, int]) -> dict[str, int]:
    named = dict(list(languages.items())[:LANGUAGES])
    others = sum(languages.values()) - sum(named.values())
    return named | ({"others": others} if others else {})


def _html(parts: list[Part]) -> str:
    body = []
    for kind, content in parts:
        if kind in ("heading", "title"):
            level = "h2" if kind == "heading" else "h3"
            body.append(f"<{level}>{escape(content)}</{level}>")
        elif kind == "table":
            rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in content)
            body.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
        else:
            for one in content:
                source = f"data:image/jpeg;base64,{base64.b64encode(one.jpeg).decode()}"
                body.append(
                    f"<figure><img alt='' src='{source}'><figcaption>{escape(one.text)}<br>{escape(one.key)}"
                    "</figcaption></figure>"
                )
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>Shards</title>"
    head += f"<style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body><h1>Shards</h1>{''.join(body)}</body></html>\n"


def _markdown(parts: list[Part], out: Path) -> str:
    lines, folder = ["# Shards", ""], out.with_name(f"{out.stem}.pictures")
    number = 0
    for kind, content in parts:
        if kind in ("heading", "title"):
            lines += [f"{'##' if kind == 'heading' else '###'} {content}", ""]
        elif kind == "table":
            columns = len(content[0])
            lines += [f"|{'|'.join(' ' * columns)}|", f"|{'---|' * columns}"]
            lines += [f"| {' | '.join(map(_plain, row))} |" for row in content] + [""]
        else:
            for one in content:
                folder.mkdir(exist_ok=True)
                (folder / f"{number:02}.jpg").write_bytes(one.jpeg)
                lines += [f"![]({folder.name}/{number:02}.jpg) {_plain(one.text)} ({_plain(one.key)})", ""]
                number += 1
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text in which Markdown finds no marks."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>()#+-!|~&" else letter for letter in text)
