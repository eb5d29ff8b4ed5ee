#!/usr/bin/env python3
"""Makes the indexes that fine-tuning reads, from one's own table, from the official files of benchmarks, or from data
sets that pip brings.

The indexes have unilm/beit3's names and fields, and what it has not: `captions` and `answers` of people, where an
evaluation needs them. The paths of images in them are relative to a folder that the training is told: data.images.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, HelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from beit3_dist.checkpoint.files import folder_made_aside
from beit3_dist.command_line import refusing
from beit3_dist.config import require
from beit3_dist.data.cache import write_whole
from beit3_dist.data.kinds import LeftOut, told
from beit3_dist.data.text import TextTokenizer
from beit3_dist.demo import tasks as demo
from beit3_dist.demo.sources import emoji_images
from beit3_dist.opening import read_json
from beit3_dist.tasks.data import benchmarks
from beit3_dist.tasks.data import own_table as own_table_module
from beit3_dist.tasks.data.benchmarks import Indexes, Records
from beit3_dist.tasks.data.glue import glue
from beit3_dist.tasks.data.marked import marked_images
from beit3_dist.tasks.data.masks import ade20k, masked_images
from beit3_dist.tasks.data.names import read_names
from beit3_dist.tasks.data.own_table import FIELDS, OPTIONAL, WORDLESS, own_table

PROGRAM = "build_index.py"
TEXTS_AT_ONCE = 4096
"""Texts that are tokenised in one call, over several threads."""
TEXTS = {"text": "text_segment", "text2": "text_segment2"}
"""Field of a record's text -> that of its token ids."""
ANSWERS = "answer2label.txt"
"""The file of VQA's answers, in the released form."""


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.encode()), "OUT")


def with_token_ids(records: Records, tokenizer: TextTokenizer) -> Iterator[dict[str, Any]]:
    """The records with `text_segment` instead of `text`, and `text_segment2` instead of `text2`; those of which one has
    no token are left out."""
    for first in range(0, len(records), TEXTS_AT_ONCE):
        some = records[first : first + TEXTS_AT_ONCE]
        lines: list[dict[str, Any] | None] = [{n: v for n, v in record.items() if n not in TEXTS} for record in some]
        for text, field in TEXTS.items():
            ids = tokenizer.encode_all([record.get(text) or "" for record in some])
            for place, (record, words) in enumerate(zip(some, ids, strict=True)):
                if (line := lines[place]) is None or text not in record:
                    continue
                empty = record[text] is None
                lines[place] = line | {field: None if empty else words} if empty or words else None
        yield from (line for line in lines if line is not None)


def write_indexes(out: Path, indexes: Indexes, tokenizer: TextTokenizer | None) -> None:
    """Writes OUT/NAME for each index, and prints a line on each. Without a tokenizer no record may have a text."""
    for name, records in indexes.items():
        if not records:
            raise ValueError(f"{name}: there is no example for it")
    for name, records in indexes.items():
        lines = list(with_token_ids(records, tokenizer)) if tokenizer else records
        write_text(out / name, "".join(json.dumps(line) + "\n" for line in lines))
        left_out = len(records) - len(lines)
        print(f"{name}: {len(lines):,} examples" + (f", {left_out} without words left out" if left_out else ""))


def write_answers(path: Path, answers: list[str]) -> None:
    write_text(path, "".join(json.dumps({"answer": answer, "label": n}) + "\n" for n, answer in enumerate(answers)))


def write_names(path: Path, names: list[str]) -> None:
    write_text(path, "".join(f"{name}\n" for name in names))


# ------------------------------------------------------------------------------------------------------------- commands


def build(read: Callable[[Path], Indexes], options: Namespace) -> None:
    """The indexes that `read` makes of a source, and nothing else."""
    tokenizer = TextTokenizer(options.text_tokenizer)
    write_indexes(options.out, read(options.source), tokenizer)


def build_vqa(options: Namespace) -> None:
    tokenizer = TextTokenizer(options.text_tokenizer)
    given = read_names(options.answers) if options.answers else None
    indexes, answers = benchmarks.vqa(options.source, given)
    write_indexes(options.out, indexes, tokenizer)
    write_answers(options.out / ANSWERS, answers)
    print(f"{ANSWERS}: {len(answers):,} answers")


def build_imagenet(options: Namespace) -> None:
    left_out: LeftOut = {}
    indexes, classes = benchmarks.imagenet(options.source, left_out)
    write_indexes(options.out, indexes, None)
    write_names(options.out / "imagenet.classes.txt", classes)
    print(f"imagenet.classes.txt: {len(classes):,} classes")
    for line in told(left_out):
        print(line, file=sys.stderr)


def build_boxes(options: Namespace) -> None:
    left_out: LeftOut | None = {} if options.leave_out_faulty else None
    indexes, categories = marked_images(options.source, options.images, left_out)
    write_indexes(options.out, indexes, None)
    write_text(options.out / "classes.jsonl", "".join(json.dumps(category) + "\n" for category in categories))
    print(f"classes.jsonl: {len(categories):,} classes")
    for reason, (count, first) in (left_out or {}).items():
        print(f"left out {count:,}: {reason}; the first is {first}", file=sys.stderr)


def build_segmentation(options: Namespace) -> None:
    left_out: LeftOut = {}
    if options.command == "ade20k":
        indexes, classes = ade20k(options.source, left_out)
    else:
        classes = read_names(options.classes)
        indexes = masked_images(options.source, len(classes), options.nothing, options.first, left_out)
    write_indexes(options.out, indexes, None)
    write_names(options.out / "segmentation.classes.txt", classes)
    print(f"segmentation.classes.txt: {len(classes):,} classes")
    for line in told(left_out):
        print(line, file=sys.stderr)


def build_glue(options: Namespace) -> None:
    left_out: LeftOut = {}
    indexes, classes = glue(options.source, left_out)
    write_indexes(options.out, indexes, TextTokenizer(options.text_tokenizer))
    write_names(options.out / "classes.txt", classes)
    print(f"classes.txt: {', '.join(classes)}")
    for reason, (count, first) in left_out.items():
        print(f"left out {count:,} lines: {reason}; the first is {first}", file=sys.stderr)


def build_table(options: Namespace) -> None:
    columns = {}
    for given in options.columns:
        field, equals, column = given.partition("=")
        known = (*FIELDS[options.task], *OPTIONAL.get(options.task, ()))
        require(bool(equals and column), f"--columns {given}: it is FIELD=COLUMN")
        require(field in known, f"--columns {given}: {options.task} has no {field!r} but {', '.join(known)}")
        columns[field] = column
    tokenizer = None
    if options.task not in WORDLESS:
        require(options.text_tokenizer is not None, f"--text_tokenizer is not given, which {options.task} needs")
        tokenizer = TextTokenizer(options.text_tokenizer)
    given_names = read_names(options.names) if options.names else None
    images = options.source.parent if options.images is None else options.images
    sides = options.source, options.validation, options.held_out
    indexes, names = own_table(options.task, *sides, columns, images, given_names)
    write_indexes(options.out, indexes, tokenizer)
    fields = f"--data.train {options.out}/{options.task}.train.jsonl --data.validation "
    fields += f"{options.out}/{options.task}.validation.jsonl"
    if "image" in FIELDS[options.task]:
        fields += f" --data.images {images}"
    if names:
        write_names(options.out / "names.txt", names)
        print(f"names.txt: {len(names):,} names")
        fields += f" --data.answers {options.out}/names.txt"
    print(f"for launchers/finetune.py: --task {options.task} {fields}")


def build_demo(options: Namespace) -> None:
    """Images and indexes aside, then renamed."""
    listed = options.out / "demo.json"
    if listed.is_file():
        if read_json(listed)["held_out"] != options.held_out:
            raise ValueError(f"{options.out} was built with another --held-out; remove it or name another folder")
        print(f"{options.out} is complete")
        return
    tokenizer = TextTokenizer(options.text_tokenizer)
    with folder_made_aside(options.out) as partial:
        easy = demo.easy_vqa()
        drawings, files = demo.retrieval(list(emoji_images(options.workers)), options.held_out)
        segments, masks = demo.segmentation(easy)
        files |= masks
        for split, source in easy.items():
            for number, path in source.paths.items():
                files[source.image_path(number, split)] = Path(path).read_bytes()
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        asked = demo.vqa(easy)
        tasks = (asked, demo.questions(asked), demo.shapes(easy), demo.captioning(easy), demo.nlvr2(easy), drawings,
                 segments, demo.objects(easy))  # fmt: skip
        for indexes in (*tasks, demo.text(options.held_out)):
            write_indexes(partial, indexes, tokenizer)
        write_answers(partial / ANSWERS, demo.ANSWERS)
        write_names(partial / "shapes.classes.txt", demo.SHAPE_CLASSES)
        write_names(partial / "segmentation.classes.txt", demo.SEGMENTS)
        write_names(partial / "objects.classes.txt", list(demo.COLORS))
        write_names(partial / "text.classes.txt", demo.TEXT_CLASSES)
        write_text(
            partial / "demo.json",
            json.dumps({"held_out": options.held_out, "pictures": len(files) - len(masks)}) + "\n",
        )
    print(f"{options.out}: {len(files) - len(masks):,} images")


# --------------------------------------------------------------------------------------------------------- command line


def parse(arguments: list[str] | None) -> Namespace:
    """The command line."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        epilog="Examples:\n"
        f"  {PROGRAM} table questions.csv indexes --task vqa --text_tokenizer beit3.spm\n"
        f"  {PROGRAM} coco dataset_coco.json indexes --text_tokenizer beit3.spm\n"
        f"  {PROGRAM} vqa vqa_v2 indexes --text_tokenizer beit3.spm --answers answer2label.txt\n"
        f"  {PROGRAM} imagenet /data/imagenet indexes\n"
        f"  {PROGRAM} boxes annotations/instances_{{train,val}}2017.json indexes --images /data/coco\n"
        f"  {PROGRAM} demo demo/tasks --text_tokenizer demo/text_tokenizer.spm",
    )
    names = "table | coco | flickr30k | vqa | nlvr2 | imagenet | boxes | ade20k | masks | glue | demo"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)

    def command(name: str, builds: Callable[[Namespace], None], source: str, text: str) -> ArgumentParser:
        form = RawDescriptionHelpFormatter if builds is build_table else HelpFormatter
        sub = commands.add_parser(name, help=text.split(".")[0], description=text, formatter_class=form)
        sub.set_defaults(build=builds)
        if source:
            many: dict[str, Any] = {"nargs": "+"} if builds is build_boxes else {}
            sub.add_argument("source", type=Path, metavar="SOURCE", help=source, **many)
        sub.add_argument("out", type=Path, metavar="OUT", help="folder of the indexes")
        if builds not in (build_imagenet, build_boxes, build_segmentation):  # which have no texts
            needed = builds is not build_table
            sub.add_argument("--text_tokenizer", required=needed, metavar="FILE", help="SentencePiece model")
        return sub

    text = "One's own table, for any task. " + str(own_table_module.__doc__).partition("\n\n")[2]
    sub = command("table", build_table, ".csv, .tsv, .jsonl or .json table, which names its columns", text)
    sub.add_argument("--task", required=True, choices=FIELDS, help="what is to be learnt")
    sub.add_argument("--validation", type=Path, metavar="TABLE", help="table of the validation; else see --held-out")
    text = "share of the pictures (or texts) that is kept aside for the validation, with all their rows; 0.1"
    sub.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help=text)
    text = "folder that the pictures lie in, data.images (default: that of the table)"
    sub.add_argument("--images", type=Path, metavar="FOLDER", help=text)
    text = "names of columns that are called otherwise, as question=frage"
    sub.add_argument("--columns", nargs="+", default=[], metavar="FIELD=COLUMN", help=text)
    text = "answers or classes to use, one a line (default: those of the table), as a model has learnt them before"
    sub.add_argument("--names", type=Path, metavar="FILE", help=text)
    text = "Retrieval and captioning on COCO, in Karpathy's split. data.images is the folder of train2014 and val2014."
    command("coco", partial(build, benchmarks.coco), "dataset_coco.json", text)
    text = "Retrieval on Flickr30k, in Karpathy's split. data.images is the folder of flickr30k-images."
    command("flickr30k", partial(build, benchmarks.flickr30k), "dataset_flickr30k.json", text)
    text = "Whether a sentence is true of two images. data.images is the folder of images/train, dev and test1."
    command("nlvr2", partial(build, benchmarks.nlvr2), "folder of train.json, dev.json and test1.json", text)
    text = "Classes of images, from a folder per class. data.images is SOURCE."
    command("imagenet", build_imagenet, "folder of train and val, with a folder per class each", text)
    text = (
        "Boxes and masks of objects: COCO's instances_train2017.json and instances_val2017.json, image_info_*.json for "
        "its test server, LVIS's and Objects365's files. Each SOURCE becomes OUT/NAME.jsonl; classes.jsonl is for "
        "data.answers. Every image and every object is looked at; of a file for training, images without an object are "
        "left out. data.images is the folder of --images."
    )
    sub = command("boxes", build_boxes, "JSON files of one data set", text)
    text = "folder of the images, or of train2017 and val2017, or of Objects365's patches"
    sub.add_argument("--images", type=Path, required=True, metavar="FOLDER", help=text)
    text = "leave out images that are missing and objects whose box, mask or class is faulty, and count them"
    sub.add_argument("--leave-out-faulty", action="store_true", help=text)
    text = (
        "A class for every pixel, ADE20K's challenge data. Every mask is read. data.images is SOURCE, data.answers "
        "OUT/segmentation.classes.txt."
    )
    command("ade20k", build_segmentation, "folder of images, annotations and objectInfo150.txt", text)
    text = (
        "A class for every pixel, of any folder. images/SIDE/NAME.jpg has its mask in masks/SIDE/NAME.png (or "
        "annotations/SIDE), a picture of numbers; a side without a folder of masks is only predicted. Every mask is "
        "read. data.images is SOURCE, data.answers OUT/segmentation.classes.txt."
    )
    sub = command("masks", build_segmentation, "folder of images and masks, with a folder per side each", text)
    text = "names of the classes, one a line"
    sub.add_argument("--classes", type=Path, required=True, metavar="FILE", help=text)
    text = "number of pixels that count for nothing; 255"
    sub.add_argument("--nothing", type=int, default=255, metavar="N", help=text)
    text = "number of the first class; 0 (ADE20K: --nothing 0 --first 1)"
    sub.add_argument("--first", type=int, default=0, metavar="N", help=text)
    text = (
        "Answers to questions, VQA v2. data.images is the folder of train2014, val2014 and test2015. The released "
        f"models need the {ANSWERS} that they were trained with: --answers."
    )
    sub = command("vqa", build_vqa, "folder of the six files v2_*.json", text)
    text = (
        "list of answers, a line {answer, label} each; default: those that are the most frequent one of "
        f"{benchmarks.LEAST_ANSWERS} questions"
    )
    sub.add_argument("--answers", type=Path, metavar="FILE", help=text)
    text = (
        "Classes of sentences and pairs, or numbers for them: a task of GLUE. OUT gets an index for each side (train, "
        "dev, dev_matched, test, ...) and classes.txt for data.answers, one name where labels are numbers (STS-B)."
    )
    command("glue", build_glue, "folder of train.tsv, dev.tsv, ... as GLUE has them, or of .jsonl files", text)
    text = (
        "Eight small tasks from data sets that pip brings, with their images. vqa (and questions: the same without "
        "images, for task text), shapes (task imagenet), captioning, nlvr2, segmentation and objects (boxes and "
        "masks): easy-VQA (MIT); retrieval: OpenMoji's drawings and their names (CC-BY-SA-4.0); text: parts of speech "
        "of the GCIDE dictionary's definitions (GPL). data.images is OUT. Returns at once if OUT is complete."
    )
    sub = command("demo", build_demo, "", text)
    text = (
        "share of drawings and dictionary entries that is tested on; 0.05. As for build_shards.py demo: then no model "
        "that was pretrained on its train side has seen them"
    )
    sub.add_argument("--held-out", type=float, default=0.05, metavar="SHARE", help=text)
    cores = len(os.sched_getaffinity(0))
    sub.add_argument("--workers", type=int, default=cores, metavar="N", help="processes that draw; one per core")
    options = parser.parse_args(arguments)
    if not 0 < getattr(options, "held_out", 0.5) < 1:
        raise ValueError(f"--held-out {options.held_out:g} is not in (0, 1)")
    if getattr(options, "workers", 1) < 1:
        raise ValueError(f"--workers {options.workers} is less than 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Builds what the command line asks for; exits with code 2 after one line where it cannot."""
    with refusing(PROGRAM):
        options = parse(arguments)
        options.build(options)


if __name__ == "__main__":
    main()
