#!/usr/bin/env python3
"""Looks for everything that can be wrong with the shards of a run, before the run.

    python tools/check_shards.py [--images PATTERN] [--texts PATTERN] [--pairs PATTERN] [--card FILE] [--json]

Every member is read: cut, broken, empty and joined tars, second members of a key, members of one sample that are not
neighbours (other loaders tear those apart), samples that lack a member, links and members of no known extension that
are left out, images that cannot be decoded or have too many pixels or whose .json tells of a failed download
(img2dataset's `status`), captions and documents that are empty or malformed. Exit code 0: nothing is wrong. 1:
something is. 2: the check cannot be done.

--card writes a data card: counts, sizes, lengths, languages, what is there twice or nearly, pictures. Pictures are
alike by perceptual hashes (imagehash) and mean colours, texts by MinHash (datasketch) of three words each.
--duplicates lists the later ones of each, by pictures in images and pairs, by documents in texts, for
`build_shards.py shards --without`; those of held-out shards that are named are listed, too, and none of these.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.progress import track

from beit3_dist.children import end_with_parent
from beit3_dist.command_line import refusing
from beit3_dist.config import DataConfig, caption_fields, require
from beit3_dist.data.cache import cache_folder
from beit3_dist.data.captions import LARGEST_CAPTION, Fields, captions_of, failed_download, fields_of, written_as
from beit3_dist.data.duplicates import Found, duplicates_in
from beit3_dist.data.facts import Facts, Gatherer
from beit3_dist.data.faults import BadSample, check_size
from beit3_dist.data.fingerprints import REMEDY
from beit3_dist.data.index import expand
from beit3_dist.data.kinds import IMAGE, JSON, JSONL, KIND_NAMES, TXT, LeftOut
from beit3_dist.data.members import members_of
from beit3_dist.data.order import Stream
from beit3_dist.data.tars import Tar
from beit3_dist.data.text import documents
from beit3_dist.data.transforms import decode, largest_file
from beit3_dist.data.unpack import plain_tar
from beit3_dist.optional import optional_module
from beit3_dist.reports.card import examples_of, facts_of, write_card

PROGRAM = "check_shards.py"
SHOWN = 20
"""Problems that the table lists; --json lists all."""


@dataclass(frozen=True)
class Work:
    stream: Stream
    path: str
    file: str
    """The plain tar: the shard itself, or its unpacked copy."""
    fields: Fields
    max_pixels: int
    held_out: bool = False
    """Whether it is only looked at for what is in others, too."""
    gathers: bool = False
    """Whether a card or a list is made."""


@dataclass
class Report:
    shard: str
    bytes: int = 0
    members: int = 0
    samples: int = 0
    """Samples that the loader will find in the index."""
    documents: int = 0
    """Texts only: documents that can be read."""
    ignored: LeftOut = field(default_factory=dict)
    """Members that nobody misses, by reason: hidden ones, and others beside those of a sample."""
    problems: list[dict[str, str]] = field(default_factory=list)
    """kind, key and reason of each."""
    facts: Facts | None = None

    def add(self, kind: str, key: bytes, reason: str) -> None:
        self.problems.append({"kind": kind, "key": key.decode("utf-8", "replace"), "reason": reason})


def check(job: Work) -> Report:
    report = Report(job.path, os.path.getsize(job.path))
    gatherer = Gatherer(job.path) if job.gathers else None
    with Tar(job.file, job.path) as tar:
        try:
            found = members_of(tar)
        except ValueError as error:
            report.add("damaged tar", b"", str(error))
            return report
        report.members, report.ignored = found.count, found.ignored
        if found.damage:
            report.add("damaged tar", b"", found.damage)
        for key, kind in found.seconds:
            report.add("duplicate", key, f"a second {KIND_NAMES[kind]} member")
        for key in found.torn:
            report.add("not adjacent", key, "other samples lie between its members")
        for reason, (count, first) in found.left_out.items():
            report.add("left out", first.encode(), f"{count:,} left out: {reason}; this is the first")
        for key, places in found.samples.items():
            sample = {kind: place for kind, place in enumerate(places) if place[1] >= 0}
            for problem, reason in _sample_problems(job, tar, key, sample, report, gatherer):
                report.add(problem, key, reason)
    if not report.samples and not report.problems:
        report.add("empty tar", b"", "no sample in this shard")
    report.facts = gatherer.facts() if gatherer else None
    return report


def _sample_problems(
    job: Work, tar: Tar, key: bytes, sample: dict[int, tuple[int, int]], report: Report, gatherer: Gatherer | None
) -> Iterator[tuple[str, str]]:
    """Kind and reason of what is wrong with one sample of the job's stream. What can be used goes to the gatherer."""
    name, data, image, captions = key.decode("utf-8", "replace"), None, None, list[str]()
    texts = [kind for kind in ((TXT, JSONL) if job.stream is Stream.TEXTS else (TXT, JSON)) if kind in sample]
    wants_image, wants_text = job.stream is not Stream.TEXTS, job.stream is not Stream.IMAGES
    lacking = ["image"] * (wants_image and IMAGE not in sample) + ["text"] * (wants_text and not texts)
    if lacking:
        yield "incomplete", f"no {' and no '.join(lacking)} member"
        return
    report.samples += len(texts) if job.stream is Stream.TEXTS else 1
    if wants_image:
        try:
            check_size("an image", sample[IMAGE][1], largest_file(job.max_pixels))
            data = tar.read(*sample[IMAGE])
            image = decode(data, job.max_pixels)
        except BadSample as bad:
            yield "too many pixels" if "max_pixels" in str(bad) else "unreadable image", str(bad)
    # All .json members are asked, not only those that a run reads for their captions.
    if wants_image and JSON in sample and sample[JSON][1] <= LARGEST_CAPTION:
        if failure := failed_download(tar.read(*sample[JSON])):
            yield "failed download", failure
            return
    if job.stream is Stream.PAIRS:
        try:
            written = written_as(sample, job.fields)
            assert written is not None
            check_size("a caption", sample[written][1], LARGEST_CAPTION)
            captions = captions_of(tar.read(*sample[written]), written, job.fields).texts
        except BadSample as bad:
            yield "bad caption", str(bad)
    if job.stream is Stream.TEXTS:
        for kind in texts:
            good = 0
            for number, text in documents(tar.lines(*sample[kind]), kind == JSONL):
                if isinstance(text, str):
                    good += 1
                    if gatherer is not None:
                        gatherer.sample(f"{name}:{KIND_NAMES[kind]}:{number}", None, None, [text])
                else:
                    yield "bad document", f"line {number} of the {KIND_NAMES[kind]} member: {text}"
            report.documents += good
            if not good:
                yield "bad document", f"the {KIND_NAMES[kind]} member holds no document"
    elif gatherer is not None and image is not None and (captions or job.stream is Stream.IMAGES):
        gatherer.sample(name, data, image, captions)


def check_all(options: Namespace) -> dict[str, Any]:
    """The report on all streams. Raises ValueError where a pattern names nothing."""
    jobs = []
    folder = cache_folder(options.cache, "--cache")
    gathers = options.card is not None or options.duplicates is not None
    for stream in Stream:
        for name in (stream.field, f"held_out_{stream.field}"):
            pattern, held_out = getattr(options, name), name != stream.field
            paths = expand(pattern, f"--{name}") if pattern else []
            asked = fields_of(options.caption_key), options.max_pixels, held_out, gathers
            jobs += [Work(stream, path, plain_tar(path, folder), *asked) for path in paths]
    require(bool(jobs), "name shards by --images, --texts or --pairs")
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        checked = pool.map(check, jobs)
        reports = list(track(checked, "checking", len(jobs), disable=not sys.stderr.isatty()))
    streams: dict[str, Any] = {}
    found: dict[str, Found] = {}
    for stream in Stream:
        of_stream = [(job, report) for job, report in zip(jobs, reports, strict=True) if job.stream is stream]
        own = [report for job, report in of_stream if not job.held_out]
        if own:
            streams[stream.field] = {
                "shards": len(own),
                **{name: sum(getattr(r, name) for r in own) for name in ("bytes", "members", "samples", "documents")},
                "ignored": sum((Counter({r: n for r, (n, _) in report.ignored.items()}) for report in own), Counter()),
                "problems": Counter(problem["kind"] for report in own for problem in report.problems),
            }
        if own and gathers:
            both = [[report.facts for job, report in of_stream if job.held_out is side] for side in (False, True)]
            found[stream.field] = duplicates_in(*([facts for facts in side if facts is not None] for side in both))
            streams[stream.field] |= facts_of(found[stream.field])
    files = {job.path: job.file for job in jobs}
    if options.card is not None:
        shown = {name: examples_of(one, files, options.max_pixels) for name, one in found.items()}
        write_card(options.card, streams, shown)
    if options.duplicates is not None:
        listed = [line for name, one in found.items() for line in one.listed(name)]
        options.duplicates.write_text("".join(json.dumps(line) + "\n" for line in listed), encoding="utf-8")
    for report in reports:
        report.facts = None
    told = ({name: value for name, value in vars(report).items() if name != "facts"} for report in reports)
    return {
        "streams": streams,
        "shards": [one | {"stream": job.stream.field} for job, one in zip(jobs, told, strict=True)],
        "problems": sum(len(report.problems) for report in reports),
    }


def table(record: dict[str, Any]) -> str:
    rows = [f"{'stream':8}{'shards':>8}{'samples':>12}{'documents':>12}{'GB':>9}  problems"]
    for name, counts in record["streams"].items():
        problems = ", ".join(f"{count} {kind}" for kind, count in counts["problems"].items()) or "none"
        rows.append(
            f"{name:8}{counts['shards']:8,}{counts['samples']:12,}{counts['documents']:12,}"
            f"{counts['bytes'] / 1e9:9.2f}  {problems}"
        )
    rows += [
        f"{name}: {count:,} members are ignored: {reason}"
        for name, counts in record["streams"].items()
        for reason, count in counts["ignored"].items()
    ]
    for name, counts in record["streams"].items():
        if "duplicates" in counts:
            rows.append(f"{name}: {', '.join(f'{count:,} {what}' for what, count in counts['duplicates'].items())}")
            if counts["held_out_samples"]:
                leaks = ", ".join(f"{count:,} {what}" for what, count in counts["held_out_duplicates"].items())
                rows.append(f"{name}, of held-out ones: {leaks}")
    told = [(shard["shard"], problem) for shard in record["shards"] for problem in shard["problems"]]
    rows += [f"{path}: {problem['key'] or 'whole shard'}: {problem['reason']}" for path, problem in told[:SHOWN]]
    if len(told) > SHOWN:
        rows.append(f"and {len(told) - SHOWN:,} others; --json lists all")
    return "\n".join(rows)


def parse(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    for stream in Stream:
        parser.add_argument(f"--{stream.field}", default="", metavar="PATTERN", help="brace or glob pattern")
    for stream in Stream:
        text = f"held-out {stream.field}, which none of those above should be like; with --card or --duplicates"
        parser.add_argument(f"--held_out_{stream.field}", default="", metavar="PATTERN", help=text)
    text = "write a data card, .html (one page) or .md (with its pictures beside it); needs the extra data"
    parser.add_argument("--card", type=Path, metavar="FILE", help=text)
    text = "write what is there twice or nearly, a JSON line each, for build_shards.py shards --without"
    parser.add_argument("--duplicates", type=Path, metavar="FILE", help=text)
    text = "as data.caption_key of the run: of a list, all fields, without weights"
    parser.add_argument("--caption_key", nargs="+", default=DataConfig.caption_key, metavar="FIELD", help=text)
    parser.add_argument("--max_pixels", type=int, default=DataConfig.max_pixels, help="as data.max_pixels of the run")
    parser.add_argument("--cache", default=DataConfig.cache, help="where compressed tars are unpacked, as data.cache")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one per core")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    require(options.jobs >= 1, f"--jobs {options.jobs} is less than 1")
    if options.card is not None:
        require(options.card.suffix in (".html", ".md"), f"--card {options.card}: its name ends in .html or .md")
    for name in ("card", "duplicates"):
        path = getattr(options, name)
        if path is not None:
            require(path.parent.is_dir() and not path.is_dir(), f"--{name} {path}: there is no folder {path.parent}")
            for package in ("imagehash", "datasketch", "py3langid"):
                optional_module(package, f"--{name}", REMEDY)
    for stream in Stream:
        held_out, compares = f"held_out_{stream.field}", options.card or options.duplicates
        require(
            not getattr(options, held_out) or bool(getattr(options, stream.field) and compares),
            f"--{held_out} is compared with --{stream.field}, for --card or --duplicates: give these, too",
        )
    if len(options.caption_key) == 1:
        [options.caption_key] = options.caption_key
    caption_fields(options.caption_key, "--caption_key")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Checks and prints; returns the exit code."""
    with refusing(PROGRAM):
        options = parse(arguments)
        record = check_all(options)
    print(json.dumps(record) if options.json else table(record))
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
