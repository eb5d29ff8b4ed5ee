#!/usr/bin/env python3
"""Builds the tars that pretraining reads, from folders, tables and texts, or from data sets that pip brings.

Two builds from the same input are the same bytes: members carry no time and no user, and the held-out share is
chosen by a hash of each sample, so a sample keeps its side when the data set grows. A build is written to OUT.partial
and renamed when it is whole; a killed one leaves that folder, which the next build replaces. OUT/shards.json lists
every shard with its count, size and SHA-256, every skipped image with the reason, and by reason the number of files
in the folder that are no images.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import sys
import threading
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset import ShardWriter

from beit3_dist.checkpoint.files import folder_made_aside, sha256
from beit3_dist.children import end_with_parent
from beit3_dist.command_line import refusing
from beit3_dist.config import DataConfig, require
from beit3_dist.data.faults import BadSample
from beit3_dist.data.kinds import IMAGE_EXTENSIONS, LeftOut, images_below, told
from beit3_dist.data.parquet import parquet_files, picture_rows
from beit3_dist.data.rewriting import listed_in, samples_without
from beit3_dist.data.sides import side
from beit3_dist.data.tables import coco_rows, table_rows, texts_in
from beit3_dist.data.transforms import decode, extension_of, read_image
from beit3_dist.demo.sources import dictionary_documents, emoji_images
from beit3_dist.demo.tasks import caption, easy_vqa
from beit3_dist.hashing import hash_bytes
from beit3_dist.opening import inside, read_json

PROGRAM = "build_shards.py"
DOCUMENTS_PER_MEMBER = 1000
"""A tar spends 1 KB on every member: one document each would make a dictionary ten times as large."""
OUT_HELP = "folder to make; it must not exist yet, or be empty"
SKIPPED_SHOWN = 10
"""Skipped images that are printed; shards.json lists all."""
JPEG_QUALITY = 95
AT_ONCE = 16
"""Images that a worker is given at a time."""
DEMO_PER_SHARD = 100
"""Images or pairs per shard of the demo: few, so that its held-out side has several shards, too."""
DEMO_DOCUMENTS_PER_MEMBER = 20
"""Documents per member of the demo's texts: with as many members per shard as images, 2,000 a shard."""
ASKED = ("command", "held_out", "limit")
Skipped = list[tuple[str, str]]
"""Path and reason of each image that was left out."""
Shards = list[dict[str, Any]]
"""Entries of shards.json: file, samples, bytes and sha256 of each tar."""


@dataclass(frozen=True)
class Sample:
    side: str
    """train or held_out."""
    members: dict[str, bytes]
    count: int = 1
    """Images, pairs or documents in it."""


# ---------------------------------------------------------------------------------------------------- images, pairs


@dataclass(frozen=True)
class ImageFile:
    """An image file on its way into a tar."""

    path: str
    text: str | None = None
    """Its captions, one a line; None in the image-only stream."""
    label: int | None = None
    """Its class, where it has one."""
    original: bytes = b""
    """What it holds, of what is no file of its own."""
    stored: bytes = b""
    extension: str = ""
    fault: str = ""
    """Why it cannot be used; empty if it can."""


def prepared(file: ImageFile, size: int) -> ImageFile:
    """The file with its content, or with its fault. With `size`, an image whose shorter side is longer than that is
    scaled down to it and encoded anew: PNG stays PNG, everything else becomes JPEG. Other files are stored as they
    are."""
    if file.fault:
        return file
    extension = Path(file.path).suffix.lower().removeprefix(".")
    if not file.original and extension not in IMAGE_EXTENSIONS:
        return replace(file, fault=f"the extension is none of {', '.join(IMAGE_EXTENSIONS)}")
    if file.text == "":
        return replace(file, fault="empty caption")
    try:
        if data := file.original:
            image, extension = decode(data, DataConfig.max_pixels), extension_of(data)
        else:
            image = read_image(file.path, DataConfig.max_pixels)
            data = Path(file.path).read_bytes()
    except OSError as error:
        return replace(file, fault=error.strerror or str(error))
    except BadSample as bad:
        return replace(file, fault=str(bad))
    shorter = min(image.size)
    if not size or shorter <= size:
        return replace(file, original=data, stored=data, extension=extension)
    width, height = (max(1, round(length * size / shorter)) for length in image.size)
    buffer = io.BytesIO()
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    extension, form = ("png", "PNG") if extension == "png" else ("jpg", "JPEG")
    scaled.save(buffer, form, quality=JPEG_QUALITY)  # which PNG does not look at
    return replace(file, original=data, stored=buffer.getvalue(), extension=extension)


def image_samples(files: Iterable[ImageFile], options: Namespace, skipped: Skipped) -> Iterator[Sample]:
    """A sample for each image that can be used, in their order; the others are added to `skipped`."""
    ahead = Ahead(options.workers * 4 * AT_ONCE)
    with multiprocessing.Pool(options.workers, end_with_parent) as pool, ahead:
        for file in pool.imap(functools.partial(prepared, size=options.size), ahead.of(files), chunksize=AT_ONCE):
            ahead.done()
            if file.fault:
                skipped.append((file.path, file.fault))
                continue
            members = {file.extension: file.stored}
            if file.text is not None:
                members["txt"] = file.text.encode()
            if file.label is not None:
                members["cls"] = str(file.label).encode()
            yield Sample(side(file.original, options.held_out), members)


class Ahead:
    """So many items at most are on their way through a pool, which by itself takes in all there are."""

    def __init__(self, most: int) -> None:
        self._free, self._ended = threading.Semaphore(most), threading.Event()

    def of(self, items: Iterable[ImageFile]) -> Iterator[ImageFile]:
        for item in items:
            while not self._free.acquire(timeout=0.1):
                if self._ended.is_set():  # the pool's thread, which waits here, has to end before the pool does
                    return
            yield item

    def done(self) -> None:
        """One has come out."""
        self._free.release()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self._ended.set()


def files_of(folder: Path, left_out: LeftOut) -> list[ImageFile]:
    """All image files below a folder, in the order of their paths, and what else is there counted. Raises ValueError
    if there is none."""
    require(folder.is_dir(), f"there is no folder {folder}")
    found = sorted(map(str, images_below(folder, left_out)))
    require(bool(found), f"no image below {folder}: none of its files ends in {', '.join(IMAGE_EXTENSIONS)}")
    return [ImageFile(path) for path in found]


def picture_files(options: Namespace) -> Iterator[ImageFile]:
    """The pictures in tables of parquet."""
    for path in parquet_files(options.files, options.left_out):
        for row in picture_rows(path, options.image, options.caption, options.label):
            text = None if row.captions is None else "\n".join(row.captions)
            yield ImageFile(row.place, text, row.label, row.picture, fault=row.fault)


def captioned(rows: Iterable[tuple[str, str]], root: Path) -> Iterator[ImageFile]:
    """The images of a table. Consecutive rows of the same image become one, with a caption a line."""
    for path, group in itertools.groupby(rows, key=lambda row: row[0]):
        captions = (" ".join(caption.split()) for _, caption in group)
        yield ImageFile(str(root / path), "\n".join(filter(None, captions)))


def inside_only(rows: Iterable[tuple[str, str]], root: Path) -> Iterator[tuple[str, str]]:
    """The rows of a table that others have made. Raises ValueError where a path leads out of its folder."""
    for row in rows:
        inside(root, row[0])
        yield row


# --------------------------------------------------------------------------------------------------------------- texts


def text_samples(texts: Iterable[str], held_out: float, per_member: int) -> Iterator[Sample]:
    """Samples of one .jsonl member each, of `per_member` documents; the last one of either side may hold fewer."""
    waiting: dict[str, list[str]] = {"train": [], "held_out": []}

    def member(name: str) -> Sample:
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in waiting[name])
        sample = Sample(name, {"jsonl": lines.encode()}, len(waiting[name]))
        waiting[name].clear()
        return sample

    for text in texts:
        name = side(text.encode(), held_out)
        waiting[name].append(text)
        if len(waiting[name]) == per_member:
            yield member(name)
    yield from (member(name) for name in waiting if waiting[name])


# -------------------------------------------------------------------------------------------------------------- writing


def write(folder: Path, source: str, samples: Iterable[Sample], per_shard: int, held_out: float) -> Shards:
    """Writes FOLDER/{train,held_out}/NNNNNN.tar, `per_shard` samples each. ValueError if there are none, naming their
    source, and if a side stays empty."""
    writers: dict[str, ShardWriter] = {}
    keys, counts = Counter[str](), Counter[str]()
    with ExitStack() as opened:  # what an error leaves open would complain when it is collected
        for sample in samples:
            if sample.side not in writers:
                target = folder.absolute() / sample.side
                target.mkdir(parents=True)
                pattern, nobody = str(target).replace("%", "%%") + "/%06d.tar", {"mtime": 0, "user": "", "group": ""}
                writer = ShardWriter(pattern, maxcount=per_shard, verbose=0, encoder=False, **nobody)
                writers[sample.side] = opened.enter_context(writer)
            writer = writers[sample.side]
            writer.write({"__key__": f"{keys[sample.side]:09d}", **sample.members})
            keys[sample.side] += 1
            counts[str(writer.fname)] += sample.count
    require(bool(writers), f"{source}: there is no usable sample")
    for name in ("train", "held_out") if held_out else ("train",):
        if name not in writers:
            raise ValueError(
                f"{folder.name.removesuffix('.partial')}: with --held-out {held_out:g}, none of its "
                f"{sum(counts.values())} usable samples falls into {name}"
            )
    return [
        {"file": path, "samples": count, "bytes": os.stat(path).st_size, "sha256": sha256(Path(path))}
        for path, count in counts.items()
    ]


def build(options: Namespace) -> None:
    """Runs the command's build aside, writes shards.json and renames. Raises ValueError if OUT is in use."""
    skipped: Skipped = []
    with folder_made_aside(options.out) as partial:
        try:
            shards = sorted(options.build(partial, options, skipped), key=lambda shard: shard["file"])
        finally:
            told_of = [
                *(f"skipped {name}: {reason}" for name, reason in skipped[:SKIPPED_SHOWN]),
                *told(options.left_out),
            ]
            if skipped:
                told_of.append(f"skipped {len(skipped)} images in all; shards.json lists those of a whole build")
            for line in told_of:
                print(line, file=sys.stderr)
        for shard in shards:
            shard["file"] = str(Path(shard["file"]).relative_to(partial.absolute()))
        asked = {name: getattr(options, name) for name in ASKED}
        record = asked | {"skipped": skipped, "left_out": options.left_out, "shards": shards}
        (partial / "shards.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for folder, group in itertools.groupby(shards, key=lambda shard: str(Path(shard["file"]).parent)):
        entries = list(group)
        samples, size = (sum(entry[name] for entry in entries) for name in ("samples", "bytes"))
        print(f"{folder}: {samples:,} samples in {len(entries)} shards, {size / 1e6:.1f} MB")


def build_images(folder: Path, options: Namespace, skipped: Skipped) -> Shards:
    images = image_samples(files_of(options.folder, options.left_out)[: options.limit], options, skipped)
    return write(folder, str(options.folder), images, options.per_shard, options.held_out)


def build_pairs(folder: Path, options: Namespace, skipped: Skipped) -> Shards:
    rows = table_rows(options.table, options.image, options.caption, options.rest_is_caption)
    pairs = itertools.islice(captioned(rows, options.root or options.table.parent), options.limit)
    images = image_samples(pairs, options, skipped)
    return write(folder, str(options.table), images, options.per_shard, options.held_out)


def build_parquet(folder: Path, options: Namespace, skipped: Skipped) -> Shards:
    files = itertools.islice(picture_files(options), options.limit)
    images = image_samples(files, options, skipped)
    return write(folder, " ".join(map(str, options.files)), images, options.per_shard, options.held_out)


def build_coco(folder: Path, options: Namespace, skipped: Skipped) -> Shards:
    require(options.folder.is_dir(), f"there is no folder {options.folder}")
    rows = inside_only(coco_rows(options.annotations, options.left_out), options.folder)
    pairs = itertools.islice(captioned(rows, options.folder), options.limit)
    images = image_samples(pairs, options, skipped)
    return write(folder, str(options.annotations), images, options.per_shard, options.held_out)


def build_texts(folder: Path, options: Namespace, skipped: Skipped) -> Shards:
    """Members of many documents each; `per_shard` documents are rounded up to whole members."""
    per_member = min(DOCUMENTS_PER_MEMBER, options.per_shard)
    texts = itertools.chain.from_iterable(map(texts_in, options.files))
    samples = text_samples(itertools.islice(texts, options.limit), options.held_out, per_member)
    source = " ".join(map(str, options.files))
    return write(folder, source, samples, math.ceil(options.per_shard / per_member), options.held_out)


def build_from_shards(folder: Path, options: Namespace, skipped: Skipped) -> Shards:
    """The samples as they are, under new keys, but for those that the list names."""
    listed = listed_in(options.without) if options.without else {}
    found = (
        one
        for pattern in options.shards
        for one in samples_without(pattern, DataConfig.cache, listed, options.left_out)
    )
    samples = (
        Sample(side(b"".join(members.values()), options.held_out), members, count)
        for members, count in itertools.islice(found, options.limit)
    )
    return write(folder, " ".join(options.shards), samples, options.per_shard, options.held_out)


def build_demo(folder: Path, options: Namespace, skipped: Skipped) -> Shards:
    """The three streams of the demo, from installed packages."""
    train = easy_vqa()["train"]  # its test side is left to the tasks
    shapes = [ImageFile(path) for path in train.paths.values()]
    captions = [ImageFile(train.paths[number], caption(shape)) for number, shape in train.shapes().items()]
    images, shown = (image_samples(some[: options.limit], options, skipped) for some in (shapes, captions))
    drawings = (
        Sample(side(emoji.identity, options.held_out), {"png": emoji.png, "txt": emoji.name.encode()})
        for emoji in emoji_images(options.workers)
    )
    # In an order that a hash gives: a validation reads the first held-out pairs, which are to be of both kinds.
    both = itertools.chain(itertools.islice(drawings, options.limit), shown)
    pairs = sorted(both, key=lambda sample: hash_bytes(sample.members["txt"] + sample.members["png"]))
    texts = itertools.islice(dictionary_documents(), options.limit)
    members = text_samples(texts, options.held_out, DEMO_DOCUMENTS_PER_MEMBER)
    return [
        *write(folder / "images", "easy-VQA", images, DEMO_PER_SHARD, options.held_out),
        *write(folder / "pairs", "OpenMoji with easy-VQA", pairs, DEMO_PER_SHARD, options.held_out),
        *write(folder / "texts", "the dictionary", members, DEMO_PER_SHARD, options.held_out),
    ]


def is_complete(options: Namespace) -> bool:
    """Whether OUT holds the whole build that is asked for. Raises ValueError if it holds another or a damaged one."""
    listed = options.out / "shards.json"
    if not listed.is_file():
        return False
    record = read_json(listed)
    if any(record.get(name) != getattr(options, name) for name in ASKED):
        raise ValueError(f"{options.out} was built with other options; remove it or name another folder")
    for shard in record["shards"]:
        path = options.out / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{path} is missing or cut; remove {options.out} and build it again")
    return True


# --------------------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None) -> Namespace:
    """The command line. Raises ValueError for a number out of range; exits with code 2 on anything else wrong."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="Examples:\n"
        f"  {PROGRAM} images ~/photos shards/images --size 256\n"
        f"  {PROGRAM} pairs coco/captions.tsv shards/pairs --held-out 0.01\n"
        f"  {PROGRAM} coco annotations/captions_train2017.json train2017 shards/coco\n"
        f"  {PROGRAM} parquet flickr30k/ shards/flickr --caption caption\n"
        f"  {PROGRAM} texts wiki-*.txt books.jsonl shards/texts\n"
        f"  {PROGRAM} shards 'shards/coco/train/*.tar' shards/coco_once --without duplicates.jsonl\n"
        f"  {PROGRAM} demo demo/data\n"
        "A run then reads 'shards/images/train/*.tar' and validates on 'shards/images/held_out/*.tar'.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    common, as_they_are = ArgumentParser(add_help=False), ArgumentParser(add_help=False)
    for one, share in ((common, 0.05), (as_they_are, 0.0)):
        text = f"share of the samples that goes to OUT/held_out and not to OUT/train, in [0, 1); {share:g}"
        one.add_argument("--held-out", type=float, default=share, metavar="SHARE", help=text)
        one.add_argument("--limit", type=int, metavar="N", help="only the first N samples of a stream")
    parallel = ArgumentParser(add_help=False)
    cores, text = len(os.sched_getaffinity(0)), "processes that decode or draw; one per core"
    parallel.add_argument("--workers", type=int, default=cores, metavar="N", help=text)
    images = ArgumentParser(add_help=False, parents=[common, parallel])
    text = "scale images down to this shorter side, never up; 0, the default: as they are"
    images.add_argument("--size", type=int, default=0, metavar="PIXELS", help=text)
    images.add_argument("--per-shard", type=int, default=10_000, metavar="N", help="images per tar; 10000")

    def command(name: str, build: Callable[..., Shards], text: str, *parents: ArgumentParser) -> ArgumentParser:
        sub = commands.add_parser(name, help=text.split(".")[0], description=text, parents=parents)
        sub.set_defaults(build=build, left_out={})
        return sub

    text = (
        "The image-only stream from a folder of images. They are taken in the order of their paths, from all "
        "folders below."
    )
    sub = command("images", build_images, text, images)
    sub.add_argument("folder", type=Path, metavar="FOLDER", help=f"is searched for .{', .'.join(IMAGE_EXTENSIONS)}")
    sub.add_argument("out", type=Path, metavar="OUT", help=OUT_HELP)

    text = (
        "Image-text pairs from a table. Each row names an image and its caption; rows of one image that follow one "
        "another become one pair with several captions, of which training draws one each time."
    )
    sub = command("pairs", build_pairs, text, images)
    text = (
        ".tsv or .csv with a header row, .jsonl, or .json with an array, any also as .gz or .zst; with columns "
        "(fields) image and caption, or those that --image and --caption name"
    )
    sub.add_argument("table", type=Path, metavar="TABLE", help=text)
    sub.add_argument("out", type=Path, metavar="OUT", help=OUT_HELP)
    sub.add_argument("--image", default="image", metavar="COLUMN", help="column of the image's path; image")
    sub.add_argument("--caption", default="caption", metavar="COLUMN", help="column of the caption; caption")
    text = (
        "the caption is the last column, and what a row holds beyond it, separators and all, belongs to it: for "
        "tables whose captions hold commas (tabs) without quotes; by default such a row is an error"
    )
    sub.add_argument("--rest-is-caption", action="store_true", help=text)
    sub.add_argument("--root", type=Path, metavar="FOLDER", help="what the paths are relative to; the table's folder")

    text = (
        "Pictures out of tables in parquet, as Hugging Face's data sets come. They are images alone, with --label "
        "beside .cls members, with --caption pairs. Rows are read a few at a time; those without a picture or caption "
        "are skipped and counted. Needs pyarrow: pip install -e '.[data]'."
    )
    sub = command("parquet", build_parquet, text, images)
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help="files, or folders of such, in this order")
    sub.add_argument("out", type=Path, metavar="OUT", help=OUT_HELP)
    text = "column of the pictures, bytes or a struct of bytes and path; image"
    sub.add_argument("--image", default="image", metavar="COLUMN", help=text)
    text = "columns of captions, texts or lists of texts, of all of which training draws; none: images alone"
    sub.add_argument("--caption", nargs="+", default=[], metavar="COLUMN", help=text)
    sub.add_argument("--label", default="", metavar="COLUMN", help="column of the classes' numbers; none by default")

    text = "Pairs from COCO's captions_*.json and the folder of its pictures; all captions of one become one pair."
    sub = command("coco", build_coco, text, images)
    sub.add_argument("annotations", type=Path, metavar="JSON", help="captions_train2017.json and the like")
    sub.add_argument("folder", type=Path, metavar="FOLDER", help="where the pictures lie")
    sub.add_argument("out", type=Path, metavar="OUT", help=OUT_HELP)

    text = (
        f"The text-only stream from text files. A tar member holds up to {DOCUMENTS_PER_MEMBER} documents, or short "
        "texts would grow tenfold."
    )
    sub = command("texts", build_texts, text, common)
    text = (
        "plain text with one document a line, .jsonl with a field 'text', or .json with an array of texts or of "
        "objects with that field; any also as .gz or .zst"
    )
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help=text)
    sub.add_argument("out", type=Path, metavar="OUT", help=OUT_HELP)
    sub.add_argument("--per-shard", type=int, default=100_000, metavar="N", help="documents per tar; 100000")

    text = (
        "Shards out of shards, of any stream: the same members, under new keys, without the samples or documents that "
        "a list names, which are counted. check_shards.py --duplicates writes one."
    )
    sub = command("shards", build_from_shards, text, as_they_are)
    sub.add_argument("shards", nargs="+", metavar="PATTERN", help="brace or glob patterns of tars")
    sub.add_argument("out", type=Path, metavar="OUT", help=OUT_HELP)
    sub.add_argument("--without", type=Path, metavar="FILE", help="JSON lines with shard and key of what is left out")
    sub.add_argument("--per-shard", type=int, default=10_000, metavar="N", help="samples per tar; 10000")

    text = (
        "All three streams from data sets that pip brings. images: easy-VQA (MIT); pairs: OpenMoji's drawings and "
        "their English names (CC-BY-SA-4.0), and easy-VQA's training images with captions such as 'a red circle'; "
        "texts: the GCIDE dictionary (GPL). OUT/{images,pairs,texts} have a folder train and a folder held_out each. "
        "Returns at once if OUT is complete."
    )
    sub = command("demo", build_demo, text, common, parallel)
    sub.add_argument("out", type=Path, metavar="OUT", help=OUT_HELP)
    sub.set_defaults(size=0)

    options = parser.parse_args(arguments)
    require(0 <= options.held_out < 1, f"--held-out {options.held_out:g} is not in [0, 1)")
    for name, least in (("limit", 1), ("size", 0), ("workers", 1), ("per_shard", 1)):
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is less than {least}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Builds what the command line asks for."""
    with refusing(PROGRAM):
        options = parse(arguments)
        if options.command == "demo" and is_complete(options):
            print(f"{options.out} is complete")
        else:
            build(options)


if __name__ == "__main__":
    main()
