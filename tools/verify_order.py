#!/usr/bin/env python3
"""Shows that a run has read exactly the samples that its config stands for.

    python tools/verify_order.py OUT [--json] [--plugins FILE ...]

The sample hash of every step in OUT/metrics.jsonl, and how many of its samples each named data set gave, are computed
again from OUT/config.yaml, the shards' indexes and the replaced samples in OUT/quarantine.jsonl; no image is decoded.
Exit code 0: all are equal. 1: a hash or a count differs, or a step is missing or there twice. 2: the run cannot be
verified.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beit3_dist.command_line import refusing
from beit3_dist.config import BatchConfig, require
from beit3_dist.data.batch import MixedBatches
from beit3_dist.data.index import Table, shard_scan
from beit3_dist.data.order import Stream, hash_sum, sample_id
from beit3_dist.data.streams import SampleStream
from beit3_dist.data.text_files import read_records
from beit3_dist.run.recorded_config import pretraining_config

PROGRAM = "verify_order.py"
Bad = dict[tuple[int, Stream], set[tuple[int, int]]]
"""(step, stream) -> (source, number in the source) of each sample that was replaced in that step."""
SHOWN = 10
"""Mistakes that the table lists; --json lists all."""


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; raises ValueError where it cannot be read."""
    require(path.exists(), f"there is no file {path}")
    return [record for _, record in read_records(path)]


class Keys:
    """Number of a sample in its source by shard and key."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.numbers = {path: number for number, path in enumerate(table.paths)}
        self.shards: dict[int, dict[str, int]] = {}

    def find(self, path: str, key: str) -> int | None:
        """The sample's number, or None if this source has no such sample."""
        shard = self.numbers.get(path)
        if shard is None:
            return None
        if shard not in self.shards:
            table = self.table
            scan = shard_scan(table.files[shard], table.marks[shard], table.file.parent)
            first, last = np.searchsorted(table.rows["shard"], [shard, shard + 1])
            rows = table.rows["row"][first:last]
            self.shards[shard] = {scan.key(int(row)): int(first) + place for place, row in enumerate(rows)}
        return self.shards[shard].get(key)


def replaced(streams: Sequence[SampleStream], faults: list[dict[str, Any]]) -> Bad:
    """The samples that quarantine.jsonl names; those of step 0 are faults of the index and in no order."""
    bad: Bad = defaultdict(set)
    keys = {stream.stream: [Keys(table) for table in stream.tables] for stream in streams}
    for fault in faults:
        if not fault["step"]:
            continue
        stream = Stream[fault["stream"].upper()]
        found = [(source, own.find(fault["shard"], fault["key"])) for source, own in enumerate(keys[stream])]
        places = {(source, number) for source, number in found if number is not None}
        require(bool(places), f"quarantine.jsonl: {fault['shard']} holds no sample {fault['key']!r}: other shards?")
        bad[fault["step"], stream] |= places
    return bad


def stream_terms(stream: SampleStream, first: int, count: int, bad: set[tuple[int, int]]) -> int:
    """The stream's share of a step's hash, from its order alone, modulo 2^64."""
    ids = []
    for position in range(first, first + count):
        # A step that lists more than it can replace has no delivered sample; its hash then differs, as it should.
        source, epoch, number = next(
            (place for place in stream.candidates(position) if (place[0], place[2]) not in bad), (0, -1, -1)
        )
        ids.append(sample_id(stream.stream, epoch, stream.starts[source] + number))
    return hash_sum(np.full(count, int(stream.stream)), np.arange(count), np.array(ids, dtype=np.int64))


def verify(out: Path, plugins: Sequence[str] = ()) -> dict[str, Any]:
    steps = records(out / "metrics.jsonl")
    require(bool(steps), f"{out / 'metrics.jsonl'} holds no step")
    quarantine = out / "quarantine.jsonl"
    config = pretraining_config(out, PROGRAM, plugins)
    batches = MixedBatches(config, config.model.image_size, 0, 1)
    streams = tuple(batches.indexed(stream) for stream in batches.streams)
    bad = replaced(streams, records(quarantine) if quarantine.exists() else [])
    mistakes: list[dict[str, Any]] = []
    consumed = dict.fromkeys(Stream, 0)
    of_sets = Counter[str]()
    for expected, record in enumerate(steps, start=1):
        if record["step"] != expected:
            mistakes.append({"step": expected, "problem": f"line {expected} holds step {record['step']}"})
            break  # The numbers of samples consumed before a missing step are unknown.
        counts = dict(zip(Stream, (record["images"], record["texts"], record["pairs"]), strict=True))
        total = 0
        sizes = BatchConfig(**{kind.field: count for kind, count in counts.items()})
        sets = batches.samples_of_sets({kind.field: count for kind, count in consumed.items()}, sizes)
        of_sets.update(sets)
        for name, count in sets.items():
            if record.get(name) != count:
                problem = f"{name} is {record.get(name)} and should be {count}"
                mistakes.append({"step": expected, "problem": problem})
        for stream in streams:
            kind = stream.stream
            total += stream_terms(stream, consumed[kind], counts[kind], bad.get((expected, kind), set()))
            consumed[kind] += counts[kind]
        hashed = f"{total % (1 << 64):016x}"
        if hashed != record["sample_hash"]:
            problem = f"the hash is {record['sample_hash']} and should be {hashed}"
            mistakes.append({"step": expected, "problem": problem})
    return {
        "run": str(out),
        "steps": len(steps),
        "samples": sum(consumed.values()),
        "sets": dict(of_sets),
        "replaced": sum(map(len, bad.values())),
        "mistakes": mistakes,
    }


def table(report: dict[str, Any]) -> str:
    mistakes = report["mistakes"]
    lines = [
        f"{report['run']}: {report['steps']:,} steps, {report['samples']:,} samples, {report['replaced']:,} replaced",
        *(f"{name}: {count:,} samples" for name, count in report["sets"].items()),
        *(f"step {mistake['step']}: {mistake['problem']}" for mistake in mistakes[:SHOWN]),
    ]
    if len(mistakes) > SHOWN:
        lines.append(f"and {len(mistakes) - SHOWN:,} others")
    lines.append(f"{len(mistakes):,} steps are wrong" if mistakes else "every step read the samples that it should")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    text = "files that define objectives of the run"
    parser.add_argument("--plugins", nargs="*", default=[], metavar="FILE", help=text)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.ERROR)  # the run's own log has the warnings of its shards
    with refusing(PROGRAM):
        report = verify(options.out, options.plugins)
    print(json.dumps(report) if options.json else table(report))
    return 1 if report["mistakes"] else 0


if __name__ == "__main__":
    sys.exit(main())
