"""A card of shards tells what is in them and what is there twice; shards are written anew without that."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3_dist.data.fingerprints import BITS, PICTURE, alike_pictures, alike_texts, picture_print, text_print
from tests.unit.tar_fixtures import exit_code, picture, sentences, write_tar
from tests.unit.test_build_shards import contents, run
from tools import check_shards


def changed(data: bytes, **how: Any) -> bytes:
    """A picture as it comes back from the web: smaller, as JPEG; or in other colours."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if how.get("turned"):
        red, green, blue = image.split()
        image = Image.merge("RGB", (blue, red, green))
    file = io.BytesIO()
    image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(file, "JPEG", quality=85)
    return file.getvalue()


def photo(seed: int) -> bytes:
    return picture(seed, 128, 96)


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    code = exit_code(check_shards.main, [*map(str, arguments), "--jobs", "1"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """20 photos; one twice as a file, one small, one in other colours, one of the held-out ones. Texts: the same but
    for case, nearly the same, a short one twice."""
    photos = [photo(n) for n in range(20)]
    more = [photos[3], changed(photos[4]), changed(photos[5], turned=True), changed(photo(50))]
    lines = [*sentences()[:20], sentences()[30], "a dog", "<script>alert(1)</script>", "of | the *held-out*"]
    write_tar(
        tmp_path / "pairs.tar",
        [
            {"__key__": f"{n:03}", "png" if n < 21 else "jpg": data, "txt": line.encode()}
            for n, (data, line) in enumerate(zip([*photos, *more], lines, strict=True))
        ],
    )
    write_tar(tmp_path / "held_out.tar", [{"__key__": "h", "png": photo(50), "txt": b"another"}])
    long = " ".join(sentences()[40:46])
    texts = [sentences()[0], sentences()[0].upper(), long, f"{long} and more", "a dog", "a dog", "a cat"]
    jsonl = "\n".join(json.dumps({"text": text}) for text in texts[4:])
    write_tar(tmp_path / "texts.tar", [{"__key__": "t", "txt": ("\n\n".join(texts[:4])).encode()},
                                       {"__key__": "u", "jsonl": jsonl.encode()}])  # fmt: skip
    return tmp_path


def test_the_card_and_shards_without_duplicates(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--pairs",
        shards / "pairs.tar",
        "--texts",
        shards / "texts.tar",
        "--held_out_pairs",
        shards / "held_out.tar",
    ]
    asked += ["--cache", shards / "cache", "--duplicates", shards / "twice.jsonl"]
    code, record = check(capsys, *asked, "--card", shards / "card.html", "--json")
    pairs, texts = record["streams"]["pairs"], record["streams"]["texts"]
    assert code == 0 and pairs["samples"] == 24 and texts["documents"] == 7
    assert (pairs["duplicates"]["same file"], pairs["duplicates"]["pictures alike"]) == (1, 2)
    assert pairs["held_out_duplicates"] == {"same file": 0, "pictures alike": 1, "same text": 0, "texts alike": 0}
    assert texts["duplicates"] == {"same text": 2, "texts alike": 3} and texts["held_out_samples"] == 0
    assert pairs["pictures"]["count"] == 24 and pairs["pictures"]["shorter_side"] == {
        "least": 72,
        "median": 96,
        "most": 96,
    }
    assert pairs["pictures"]["shorter_sides"] == {"64 to 127": 24}
    assert sum(pairs["texts"]["lengths"].values()) == 24 and pairs["texts"]["languages"]["en"] > 15
    listed = [json.loads(line) for line in (shards / "twice.jsonl").read_text().splitlines()]
    assert [(line["stream"], line["key"], line["like"]["key"]) for line in listed] == [
        ("texts", "t:.txt:3", "t:.txt:1"), ("texts", "t:.txt:7", "t:.txt:5"), ("texts", "u:.jsonl:2", "u:.jsonl:1"),
        ("pairs", "020", "003"), ("pairs", "021", "004"), ("pairs", "023", "h"),
    ]  # fmt: skip
    page = (shards / "card.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page and page.count("data:image/jpeg") == 12 + 6
    assert "pictures alike of a held-out one" in page and "Languages, as py3langid guesses" in page

    assert run("shards", shards / "pairs.tar", shards / "pairs", "--without", shards / "twice.jsonl") == 0
    assert "left out 3 files: listed as duplicates; the first is 020 of " in capsys.readouterr().err
    told = json.loads((shards / "pairs" / "shards.json").read_text())
    assert told["left_out"]["listed as duplicates"][0] == 3 and told["shards"][0]["samples"] == 21
    assert run("shards", shards / "texts.tar", shards / "texts", "--without", shards / "twice.jsonl") == 0
    kept = b"".join(data for _, data in contents(shards / "texts" / "train"))
    assert kept.count(b"a dog") == 1 and b"and more" not in kept and sentences()[0].encode() in kept
    again = ["--pairs", shards / "pairs" / "train" / "*.tar", "--texts", shards / "texts" / "train" / "*.tar"]
    card = shards / "again.md"
    code, record = check(capsys, *again, "--cache", shards / "cache", "--card", card, "--json")
    assert code == 0 and record["streams"]["texts"]["documents"] == 4
    assert not any(record["streams"][name]["left_out"] for name in ("pairs", "texts"))
    assert (
        shards / "again.pictures" / "11.jpg"
    ).stat().st_size > 300 and "![](again.pictures/00.jpg)" in card.read_text()
    assert "## pairs" in card.read_text() and "| samples | 21 |" in card.read_text()

    (shards / "other.jsonl").write_text(json.dumps({"shard": str(shards / "pairs.tar"), "key": "99"}) + "\n")
    assert run("shards", shards / "pairs.tar", shards / "p2", "--without", shards / "other.jsonl") == 2
    assert "has no sample '99', which the list names: was it made of other shards?" in capsys.readouterr().err
    assert not (shards / "p2").exists()


REFUSED = {
    "ending": (["--card", "{}/card.pdf"], "its name ends in .html or .md"),
    "folder": (["--duplicates", "{}/nowhere/a.jsonl"], "there is no folder"),
    "alone": (["--held_out_pairs", "{}/held_out.tar"], "--held_out_pairs is compared with --pairs, for --card or"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(shards: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    options, message = REFUSED[case]
    asked = ["--pairs", str(shards / "pairs.tar"), *(option.format(shards) for option in options)]
    assert exit_code(check_shards.main, asked) == 2
    assert message in capsys.readouterr().err


def test_pictures_alike_are_all_found() -> None:
    """Beside a comparison of all with all: of random prints, some with a few bits and levels changed."""
    rng = np.random.default_rng(0)
    prints = np.zeros(3000, dtype=PICTURE)
    prints["hash"] = rng.integers(0, 1 << 63, len(prints), dtype=np.uint64)
    prints["colours"] = rng.integers(20, 200, prints["colours"].shape)
    for number in range(0, 3000, 3):
        of = int(rng.integers(0, 3000))
        bits = rng.choice(64, int(rng.integers(0, 7)), replace=False)
        prints["hash"][number] = prints["hash"][of] ^ np.bitwise_or.reduce(
            np.uint64(1) << bits.astype(np.uint64), initial=0
        )
        prints["colours"][number] = prints["colours"][of] + rng.integers(0, 20)
    near = np.bitwise_count(prints["hash"][:, None] ^ prints["hash"]) <= BITS
    colours = prints["colours"].astype(np.int16)
    rows, columns = np.nonzero(np.tril(near, -1))
    close = np.abs(colours[rows] - colours[columns]).max(1) <= 16
    alike = {*zip(rows[close].tolist(), columns[close].tolist(), strict=True)}
    found = alike_pictures(prints)
    assert (found <= np.arange(3000)).all() and (found[found] == found).all()
    stays = found == np.arange(3000)
    assert not [pair for pair in alike if stays[pair[0]] and stays[pair[1]]], "two that stay are alike"
    assert {*np.flatnonzero(~stays).tolist()} <= {later for later, _ in alike} and (~stays).sum() > 300
    assert len(alike_pictures(prints[:0])) == 0 and len(alike_texts(np.zeros(0, text_print("a").dtype))) == 0


def test_prints_of_alike_and_other_texts() -> None:
    long = " ".join(sentences()[:5])
    other = " ".join(sentences()[50:55])
    texts = [long, other, long.replace("the", "a", 1), f"{other} {long}", "a b", " A  b ", "a c"]
    assert alike_texts(np.concatenate([text_print(text) for text in texts])).tolist() == [0, 1, 0, 3, 4, 4, 6]
    image = Image.open(io.BytesIO(photo(1))).convert("RGB")
    smaller = Image.open(io.BytesIO(changed(photo(1)))).convert("RGB")
    assert np.bitwise_count(picture_print(image)["hash"] ^ picture_print(smaller)["hash"]) <= BITS
