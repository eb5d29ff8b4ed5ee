"""The samples of shards, without some that a list names: what shards are written anew from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from beit3_dist.data.cache import cache_folder
from beit3_dist.data.faults import BadSample, check_size
from beit3_dist.data.index import expand
from beit3_dist.data.kinds import IMAGE, JSONL, TXT, LeftOut, hidden, key_and_extension, key_and_kind, leave_out
from beit3_dist.data.tars import DamagedTar, Tar
from beit3_dist.data.text_files import read_records, unmarked
from beit3_dist.data.unpack import plain_tar

LARGEST = 1 << 30
"""Bytes of a member that is copied."""
LISTED = "listed as duplicates"
"""The reason of those that the list names."""
Listed = dict[str, set[str]]
"""Shard -> keys; of a document KEY:.EXTENSION:LINE."""


def listed_in(path: Path) -> Listed:
    """What a list of check_shards.py --duplicates names. Raises ValueError naming file and line."""
    listed: Listed = defaultdict(set)
    for place, record in read_records(path):
        named = [record.get(name) if isinstance(record, dict) else None for name in ("shard", "key")]
        if not all(isinstance(name, str) for name in named):
            raise ValueError(f"{place}: it has no shard and key, as check_shards.py --duplicates writes them")
        listed[str(named[0])].add(str(named[1]))
    return listed


def samples_without(
    pattern: str, cache: str, listed: Listed, left_out: LeftOut
) -> Iterator[tuple[dict[str, bytes], int]]:
    """Members, by extension, of each sample of the shards, with the number of images or documents; what is left out is
    counted. Raises ValueError where a shard is damaged, or lacks a sample that is listed for it."""
    folder = cache_folder(cache)
    for path in expand(pattern, "SHARDS"):
        waiting = set(listed.get(path, ()))
        try:
            with Tar(plain_tar(path, folder), path) as tar:
                yield from _samples(tar, path, waiting, left_out)
        except DamagedTar as damage:
            raise ValueError(f"{path}: {damage}: tools/check_shards.py tells what is wrong with shards") from None
        for key in sorted(waiting):
            raise ValueError(f"{path} has no sample {key!r}, which the list names: was it made of other shards?")


def _samples(tar: Tar, path: str, waiting: set[str], left_out: LeftOut) -> Iterator[tuple[dict[str, bytes], int]]:
    found: dict[bytes, dict[str, tuple[int, int]]] = {}
    for name, offset, size, odd in tar:
        raw, end = key_and_extension(name)
        if hidden(name) or odd or not end.isalnum():
            leave_out(left_out, odd or "hidden or without an extension", f"{name.decode('utf-8', 'replace')} of {path}")
        else:
            found.setdefault(raw, {})[end.decode("ascii", "replace")] = offset, size
    for raw, places in found.items():
        key = raw.decode("utf-8", "replace")
        if key in waiting:
            waiting.remove(key)
            leave_out(left_out, LISTED, f"{key} of {path}")
            continue
        try:
            for _, size in places.values():
                check_size("a member", size, LARGEST)
        except BadSample as bad:
            leave_out(left_out, str(bad), f"{key} of {path}")
            continue
        kinds = {extension: key_and_kind(f"a.{extension}".encode())[1] for extension in places}
        if IMAGE in kinds.values():
            yield {extension: tar.read(*place) for extension, place in places.items()}, 1
            continue
        members: dict[str, bytes] = {}
        documents = 0
        for extension, place in places.items():
            if kinds[extension] in (TXT, JSONL):
                lines = _lines(tar.lines(*place), f"{key}:.{extension}", waiting, path, left_out)
                documents += (own := sum(bool(line.strip()) for line in lines))
                members |= {extension: b"".join(lines)} if own else {}
        if documents:
            yield members, documents


def _lines(lines: Iterator[bytes], name: str, waiting: set[str], path: str, left_out: LeftOut) -> list[bytes]:
    """Those of a text member that are not listed."""
    kept = []
    for number, line in enumerate(unmarked(lines), start=1):
        place = f"{name}:{number}"
        if place in waiting:
            waiting.remove(place)
            leave_out(left_out, LISTED, f"{place} of {path}")
        else:
            kept.append(line)
    return kept
