"""Damages files at random, in their bytes and in what they mean, and hands them to whatever reads such files.

    python -m tests.integration.fuzzing FOLDER SEEDS [KIND ...]

A file is a function of its kind and seed, so that each failure can be looked at alone:

    python -m tests.integration.fuzzing /tmp/fuzz 1 'spm:117'

Prints a line of JSON per kind: how many files were taken and how many refused, the longest time and the peak of memory,
and the seeds of those that ended in anything but one clear line, took too long or too much, or wrote elsewhere.
"""

from __future__ import annotations

import faulthandler
import gzip
import io
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from beit3_dist.checkpoint import neutral, read
from beit3_dist.checkpoint.files import sha256
from beit3_dist.checkpoint.find import find, read_state
from beit3_dist.checkpoint.formats import read_source
from beit3_dist.checkpoint.neutral import write_neutral
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.data.captions import captions_of
from beit3_dist.data.faults import BadSample
from beit3_dist.data.kinds import JSON
from beit3_dist.data.lines import lines_of
from beit3_dist.data.order import Stream
from beit3_dist.data.streams import ImageStream, Origin, PairStream, TextStream
from beit3_dist.data.tars import DamagedTar, headers
from beit3_dist.data.text import TextTokenizer, documents
from beit3_dist.image_tokenizer.codes import PrecomputedCodes, write_codes
from beit3_dist.inference import Model
from beit3_dist.model import BEiT3
from beit3_dist.tasks.data.class_shards import read_class_shards
from beit3_dist.tasks.data.examples import read_index
from beit3_dist.tasks.data.names import read_names
from beit3_dist.tasks.registry import task_class
from tests.unit.tar_fixtures import image_tar, pair_tar, sentences, text_tar, train_tokenizer, write_tar
from tests.unit.test_examples import RECORDS
from tests.unit.test_formats import TINY
from tests.unit.test_inference import save as save_model
from tests.unit.test_neutral import write_checkpoint
from tools.check_shards import Work, check

MEMORY = 300 << 20
"""Bytes that a reader may take beyond what the process has."""
SECONDS = 30.0
"""The longest that a reader may take, on a busy machine."""
SECRET = b"what lies beside"

# ------------------------------------------------------------------------------------------------------------ mutations


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four places changed, lost, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(changed) + 1), draw.choice([1, 2, 4, 8, 40, 512])
        match draw.randrange(6):
            case 0:
                changed[at : at + length] = draw.randbytes(length)
            case 1:
                changed[at : at + length] = bytes([draw.choice([0, 255, 0x7F, 0x80, 10, 32])]) * length
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length] * draw.choice([1, 3, 100])
            case 4 if changed:
                changed[at % len(changed)] ^= 1 << draw.randrange(8)
            case _:
                del changed[at:]
    return bytes(changed)


def odd_value(draw: random.Random) -> Any:
    """What a program does not write there."""
    number = draw.choice([0, 1, 7, 8, 1 << 31, 1 << 32, 1 << 40, 1 << 62, 1 << 63, 1 << 64, 10**30, 10**400])
    name = draw.choice(
        ["", ".", "..", "../x", "../../x", "/etc/passwd", "a/../../x", "a\0b", "\ud800", "x" * 5000, "é"]
    )
    return draw.choice([
        number, -number, float(min(number, 1 << 64)), number + 0.5 if number < 1 << 40 else 0.5, math.nan, math.inf,
        -math.inf, None, True, False, name, name, [], {}, [number], {name: number}, [[name]], Deep(), [0] * 3000, "1",
    ])  # fmt: skip


class Deep:
    """Stands for a list nested more deeply than Python's stack is."""

    MARK = "@deep@"
    TEXT = "[" * 50_000 + "]" * 50_000


def as_text(value: Any) -> str:
    """JSON with whatever `odd_value` gives."""
    return json.dumps(value, default=lambda _: Deep.MARK).replace(f'"{Deep.MARK}"', Deep.TEXT)


def spoil_value(value: Any, draw: random.Random) -> Any:
    """One node somewhere in a JSON value replaced, lost, renamed or repeated."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return odd_value(draw)
    if isinstance(value, list):
        place = draw.randrange(len(value))
        action = draw.randrange(4)
        if action == 0:
            return value[:place] + value[place + 1 :]
        if action == 1:
            return [*value, *value[place:]]
        return [spoil_value(item, draw) if number == place else item for number, item in enumerate(value)]
    key = draw.choice(list(value))
    action = draw.randrange(5)
    if action == 0:
        return {name: item for name, item in value.items() if name != key}
    if action == 1:
        new = odd_value(draw)
        return {(new if isinstance(new, str) else "extra") if name == key else name: i for name, i in value.items()}
    if action == 2:
        new = odd_value(draw)
        return value | {(new if isinstance(new, str) else "extra"): value[key]}
    return {name: spoil_value(item, draw) if name == key else item for name, item in value.items()}


def spoil_json(data: bytes, draw: random.Random, indent: int | None = None) -> bytes:
    """A JSON text with other bytes, another value, or a field twice."""
    kind = draw.randrange(10)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # it is spoilt already
        kind = 0
    if kind < 3:
        return spoil_bytes(data, draw)
    if kind == 3 and isinstance(value, dict) and value:
        key = draw.choice(list(value))
        return (as_text(value)[:-1] + f", {json.dumps(key)}: {as_text(odd_value(draw))}}}").encode()
    for _ in range(draw.randint(1, 2)):
        value = spoil_value(value, draw)
    text = as_text(value)
    if indent and Deep.TEXT not in text and draw.random() < 0.8:
        text = json.dumps(json.loads(text), indent=indent) + "\n"  # as our files are written
    return text.encode("utf-8", "surrogatepass")


NUMBERS = [b"", b"-0000001000\0", b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"0x10\0", b"1_0\0",
           b"\x80" + bytes(6) + b"\x10\0\0\0\0", b"00000000000\0", b"\0" * 12, b"99999999999\0", b" 7 7\0"]  # fmt: skip
TYPES = [b"0", b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"V", b"\xff"]
NAMES = [b"../x.png", b"/etc/x.png", b"", b"..", b"a" * 100, b"0001.png", b"._0001.png", b"x.JPG", b"\xff\xfe.txt",
         b"x.jsonl"]  # fmt: skip


def spoil_tar(data: bytes, draw: random.Random) -> bytes:
    """Bytes anywhere, or fields of a header under a right checksum, or members put before others."""
    if draw.random() < 0.25:
        return spoil_bytes(data, draw)
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        places = [at for at in range(0, len(changed) - 511, 512) if changed[at + 257 : at + 262] == b"ustar"]
        if not places:
            break
        at = draw.choice(places)
        match draw.randrange(7):
            case 0 | 1:
                number = draw.choice(NUMBERS)
                changed[at + 124 : at + 136] = number.ljust(12, b"\0")[:12]
            case 2:
                changed[at + 156 : at + 157] = draw.choice(TYPES)
            case 3:
                changed[at : at + 100] = draw.choice(NAMES).ljust(100, b"\0")[:100]
            case 4:
                changed[at:at] = extended_header(draw)
                continue
            case 5:
                del changed[at : at + 512]
                continue
            case _:
                place = draw.choice(places)
                changed[at:at] = changed[place : place + 1024]
                continue
        sign(changed, at)
    return bytes(changed)


def sign(tar: bytearray, at: int) -> None:
    """The right checksum of a header."""
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])


def extended_header(draw: random.Random) -> bytes:
    """A header of POSIX, with odd records."""
    records = b"".join(
        draw.choice([b"%d", b"-%d", b"%d ", b"0%d"]) % draw.choice([0, 5, 12, 99, 10**20])
        + b" " + draw.choice([b"size", b"path", b"GNU.sparse.map", b""]) + b"="
        + draw.choice([b"-1", b"9" * 30, b"x", b"../x.png", b"0", b"", b"1" * 5000]) + draw.choice([b"\n", b""])
        for _ in range(draw.randint(0, 3))
    )  # fmt: skip
    header = bytearray(512)
    header[:5] = b"./pax"
    header[124:136] = draw.choice([b"%011o\0" % len(records), b"%011o\0" % (1 << 32), b"-0000000001\0"])
    header[156:157] = draw.choice([b"x", b"g", b"L", b"X"])
    header[257:265] = b"ustar\x0000"
    sign(header, 0)
    return bytes(header) + records + bytes(-len(records) % 512)


def spoil_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, of a length that fits or does not."""
    kind = draw.randrange(10)
    if kind < 2:
        return spoil_bytes(data, draw)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    value = json.loads(header)
    fragments = value.get("__metadata__", {}).get("fragments")
    if fragments and kind < 6:
        value["__metadata__"]["fragments"] = spoil_json(fragments.encode(), draw).decode("utf-8", "replace")
        header = as_text(value).encode("utf-8", "surrogatepass")
    else:
        header = spoil_json(header, draw)
    said = draw.choice([0, 1 << 20, 1 << 40, (1 << 64) - 1]) if draw.random() < 0.1 else len(header)
    return struct.pack("<Q", said) + header + rest


def spoil_lines(data: bytes, draw: random.Random) -> bytes:
    """JSON lines with some of them spoilt, and other ends."""
    lines = data.splitlines()
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(lines))
        if draw.random() < 0.9 or len(lines[place]) > 1000:
            lines[place] = spoil_json(lines[place], draw)
        else:
            lines[place] *= draw.choice([2, 5000])
    start = b"\xef\xbb\xbf" if draw.random() < 0.1 else b""
    return start + draw.choice([b"\n", b"\n", b"\n", b"\r\n", b"\n\n", b"\x0b", "\u2028".encode()]).join(lines)


def spoil_spm(data: bytes, draw: random.Random) -> bytes:
    """A SentencePiece model, which is a protocol buffer, with fields lost, repeated, swapped or of other lengths."""
    if draw.random() < 0.4:
        return spoil_bytes(data, draw)
    fields = list(fields_of(data))
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(fields))
        number, content = fields[place]
        match draw.randrange(6):
            case 0:
                del fields[place]
            case 1:
                fields[place:place] = [(number, content)] * draw.choice([1, 300])
            case 2:
                fields[place] = (number, spoil_bytes(content, draw))
            case 3:
                fields[place] = (draw.choice([1, 2, 3, 4, 5, 99]), content)
            case 4:
                piece = draw.choice([b"", b"\xff\xfe", b"a" * 3000, b"<unk>", b"\xe2\x96\x81"])
                score = struct.pack("<f", draw.choice([math.nan, math.inf, -math.inf, 1e38]))
                kind = bytes([0x18, draw.choice([0, 1, 2, 3, 4, 5, 6, 99])])
                fields[place] = (1, b"\x0a" + varint(len(piece)) + piece + b"\x15" + score + kind)
            case _:
                draw.shuffle(fields)
        if not fields:
            break
    packed = b"".join(varint(number << 3 | 2) + varint(len(content)) + content for number, content in fields)
    return packed + (draw.choice([b"\x0a" + varint(1 << 40), b"\x0a" + 5 * b"\xff"]) if draw.random() < 0.1 else b"")


def varint(value: int) -> bytes:
    """A number as protocol buffers hold it."""
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def fields_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of the fields of a protocol buffer that holds nothing but messages."""

    def number() -> int:
        value = shift = 0
        while True:
            (byte,) = file.read(1)
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    file = io.BytesIO(data)
    while file.tell() < len(data):
        field = number() >> 3
        yield field, file.read(number())


# -------------------------------------------------------------------------------------------------------------- readers


class Originals:
    """Whole files of every kind, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        words = sentences()
        self.spm = train_tokenizer(folder / "words.spm")
        self.tokenizer = TextTokenizer(str(self.spm))
        self.tars = {
            Stream.IMAGES: image_tar(folder / "images.tar", 4),
            Stream.PAIRS: pair_tar(folder / "pairs.tar", 4),
            Stream.TEXTS: text_tar(folder / "texts.tar", words[:8]),
        }
        caption = json.dumps({"caption": "a dog", "id": 3}).encode()
        picture = tarfile.open(self.tars[Stream.IMAGES]).extractfile("0000.png")
        assert picture is not None
        self.odd_pairs = write_tar(folder / "json.tar", [{"__key__": "a", "png": picture.read(), "json": caption}])
        self.checkpoint = write_checkpoint(folder / "step_0000007", 1, 2, BEiT3(TINY).state_dict(), TINY, RECIPE)
        self.model = save_model(folder / "model", "vqa", None)
        write_codes(folder / "codes", [(torch.arange(5), torch.zeros(5, 4))], {}, (3, 2))
        self.codes = folder / "codes"
        for name in ("a/x.JPEG", "a/y.jpg", "b/z.png"):
            (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "pictures" / name).write_bytes(b"x")


RECIPE = "out: x\nsteps: 10\nmodel:\n  layers: 2\ntext_tokenizer: words.spm\ndata:\n  images: a\n"


def use_tar(files: Originals, place: Path, draw: random.Random) -> None:
    stream = draw.choice(list(Stream))
    source = files.odd_pairs if stream is Stream.PAIRS and draw.random() < 0.5 else files.tars[stream]
    data = spoil_tar(source.read_bytes(), draw)
    packed = draw.random() < 0.15
    if packed:
        data = gzip.compress(data, 1)
        data = spoil_bytes(data, draw) if draw.random() < 0.5 else data
    tar, cache = place / ("a.tar.gz" if packed else "a.tar"), str(place / "cache")
    tar.write_bytes(data)
    if not packed:
        with suppress(DamagedTar, ValueError):  # as a stream, whose end is not known
            for _ in headers(lambda at, size: data[at : at + size], math.inf, str(tar)):
                pass
        check(Work(stream, str(tar), str(tar), "caption", 10**6))
    if stream is Stream.IMAGES and draw.random() < 0.2:
        list(read_class_shards(str(tar), "data.train", cache, 3))
    if stream is Stream.IMAGES:
        read: Any = ImageStream(Origin(str(tar), "data.images", 0, cache), 10**6)
    elif stream is Stream.TEXTS:
        read = TextStream(Origin(str(tar), "data.texts", 0, cache), files.tokenizer, 16)
    else:
        read = PairStream(Origin(str(tar), "data.pairs", 0, cache), 10**6, files.tokenizer, 16, "caption")
    for position in range(6):
        read.read(position)


def resign(checkpoint: Path) -> None:
    """The manifest that fits the files."""
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    entries = {n: {"bytes": (checkpoint / n).stat().st_size, "sha256": sha256(checkpoint / n)} for n in sorted(names)}
    (checkpoint / "manifest.json").write_text(json.dumps(entries, indent=1) + "\n")


def use_checkpoint(checkpoint: Path, place: Path, draw: random.Random) -> None:
    """One of the ways in which a checkpoint is used."""
    match draw.randrange(3):
        case 0:
            write_neutral(checkpoint, place / "out" / "neutral")
        case 1:
            read_source(checkpoint)
        case _:
            assert find(str(checkpoint), checkpoint.parent) is not None
            read_state(checkpoint, TINY)
            read_weights(checkpoint)


def use_manifest(files: Originals, place: Path, draw: random.Random) -> None:
    if draw.random() < 0.15:
        codes = Path(shutil.copytree(files.codes, place / "codes"))
        (codes / "manifest.json").write_bytes(spoil_json((codes / "manifest.json").read_bytes(), draw))
        PrecomputedCodes(codes, "image_codes", 8).check({}, (3, 2))
        return
    checkpoint = Path(shutil.copytree(files.checkpoint, place / files.checkpoint.name))
    name = draw.choice(["manifest.json", "manifest.json", "state.json", "config.yaml"])
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(spoil_bytes(data, draw) if name == "config.yaml" else spoil_json(data, draw, 1))
    if name != "manifest.json":
        resign(checkpoint)
    use_checkpoint(checkpoint, place, draw)


def use_safetensors(files: Originals, place: Path, draw: random.Random) -> None:
    if draw.random() < 0.5:
        checkpoint = Path(shutil.copytree(files.checkpoint, place / files.checkpoint.name))
        shard = checkpoint / "shard_00001.safetensors"
        shard.write_bytes(spoil_header(shard.read_bytes(), draw))
        resign(checkpoint)
        use_checkpoint(checkpoint, place, draw)
        return
    model = Path(shutil.copytree(files.model, place / "model"))
    name = draw.choice(["model.safetensors", "config.json"])
    data = (model / name).read_bytes()
    (model / name).write_bytes(spoil_json(data, draw, 1) if name == "config.json" else spoil_header(data, draw))
    if draw.random() < 0.5:
        read_source(model)
    else:
        Model.load(model, "cpu")


def use_lines(files: Originals, place: Path, draw: random.Random) -> None:
    match draw.randrange(4):
        case 0:
            data = "\n".join(json.dumps({"text": text, "id": 3}) for text in sentences()[:6]).encode()
            found = list(documents(lines_of(io.BytesIO(spoil_lines(data, draw)).readline), True))
            files.tokenizer.encode_all([text for _, text in found if isinstance(text, str)])
        case 1:
            try:
                captions_of(spoil_json(b'{"caption": "a dog", "captions": ["x", "y"]}', draw), JSON, "caption")
            except BadSample:
                raise ValueError("bad sample") from None
        case 2:
            answers = "\n".join(json.dumps({"answer": f"a {n}", "label": n}) for n in range(6)).encode()
            (place / "answers.txt").write_bytes(spoil_lines(answers, draw))
            read_names(place / "answers.txt")
        case _:
            task = draw.choice(list(RECORDS))
            data = "\n".join([json.dumps(RECORDS[task])] * 5).encode()
            (place / "index.jsonl").write_bytes(spoil_lines(data, draw))
            root = files.folder / "pictures"
            for example in read_index(
                place / "index.jsonl", task_class(task), root, train=True, vocab_size=20, classes=9
            ):
                assert all(os.path.abspath(str(image)).startswith(f"{root}/") for image in example.images)


def use_spm(files: Originals, place: Path, draw: random.Random) -> None:
    (place / "a.spm").write_bytes(spoil_spm(files.spm.read_bytes(), draw))
    tokenizer = TextTokenizer(str(place / "a.spm"))
    ids = tokenizer.encode("the quick brown fox \u2581 <unk> \U0001f600 1,000")
    assert all(0 <= word < tokenizer.rows for word in ids)
    tokenizer.decode(ids)
    tokenizer.encode_all(["one", "two three", ""])


KINDS: dict[str, Callable[[Originals, Path, random.Random], None]] = {
    "tar": use_tar, "manifest": use_manifest, "safetensors": use_safetensors, "jsonl": use_lines, "spm": use_spm
}  # fmt: skip

# -------------------------------------------------------------------------------------------------------------- running


def data_bytes() -> int:
    """Memory of this process that counts for RLIMIT_DATA."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmData"))


def verdict(kind: str, seed: int, files: Originals, box: Path) -> str:
    """taken, refused, or what is wrong."""
    place = box / "in" / "place"
    shutil.rmtree(place, ignore_errors=True)
    (place / "out").mkdir(parents=True)
    started = time.monotonic()
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
    try:
        KINDS[kind](files, place, random.Random(f"{kind} {seed}"))
        outcome = "taken"
    except (ValueError, OSError, RuntimeError) as error:
        bad_samples = isinstance(error, RuntimeError) and "bad samples in a row" in str(error)
        clear = bad_samples or not isinstance(error, RuntimeError | UnicodeError)
        outcome = "refused" if clear and "\n" not in str(error) else f"no clear line: {traceback.format_exc()}"
    except BaseException:
        outcome = f"a traceback: {traceback.format_exc()}"
    faulthandler.cancel_dump_traceback_later()
    if time.monotonic() - started > SECONDS:
        outcome = f"took {time.monotonic() - started:.0f} s"
    if sorted(os.listdir(box)) != ["in", "secret"] or os.listdir(box / "in") != ["place"]:
        outcome = f"wrote elsewhere: {os.listdir(box)}, {os.listdir(box / 'in')}"
    if (box / "secret").read_bytes() != SECRET:
        outcome = "wrote over the secret"
    return outcome


def main(folder: str, seeds: int, wanted: list[str]) -> None:
    """Runs `seeds` seeds of each kind, or the one of KIND:SEED."""
    box, files = Path(folder) / "box", Originals(Path(folder))
    (box / "in").mkdir(parents=True)
    (box / "secret").write_bytes(SECRET)
    os.chdir(box / "in")
    neutral.BUFFER = read.BUFFER = 1 << 16
    for kind in KINDS:  # whatever is imported or made at the first use
        verdict(kind, 0, files, box)
    limit = data_bytes() + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    for name in wanted or list(KINDS):
        kind, _, one = name.partition(":")
        summary: dict[str, Any] = {"kind": kind, "taken": 0, "refused": 0, "failed": {}}
        for seed in [int(one)] if one else range(1, seeds + 1):
            print(f"{kind}:{seed}", file=sys.stderr, flush=True)  # the last one of a process that dies
            outcome = verdict(kind, seed, files, box)
            if outcome in summary:
                summary[outcome] += 1
            else:
                summary["failed"][f"{kind}:{seed}"] = outcome
        print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    sentencepiece.set_min_log_level(3)
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
