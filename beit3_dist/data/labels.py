"""Classes of the images in tars, for those who ask: the .cls member beside an image holds the class's number.

They are read once, kept in the cache folder beside the table of the shards, and known before training begins.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from beit3_dist.data.cache import cached, digest, mapped, write_whole
from beit3_dist.data.index import SCANNERS, Table, shard_keys
from beit3_dist.data.kinds import hidden, key_and_extension
from beit3_dist.data.tars import DamagedTar, Tar
from beit3_dist.looking import of_node
from beit3_dist.opening import without_mark

CLASS = b"cls"
"""Extension of the members that hold classes."""
LONGEST_LABEL = 64
"""Bytes of such a member; what is longer is no number of a class."""
LARGEST = 1 << 31
"""No class has a number as large."""
NONE, NO_NUMBER = -1, -2
"""Stand for an image without a .cls member, and for one that holds no class's number."""


def class_of(content: bytes) -> int:
    """The class in a .cls member, or NO_NUMBER."""
    written = without_mark(content).strip()
    return int(written) if written.isdigit() and int(written) < LARGEST else NO_NUMBER


def labels_of(table: Table, field: str, classes: int) -> np.ndarray:
    """int64 [samples]: the classes of a table's images, memory-mapped.

    Raises ValueError naming `field`, with the number of images without a class in range(classes) and the first of them.
    """
    file = table.file.with_suffix(".labels.npy")

    def read() -> np.ndarray:
        return mapped(file, "classes of this table", lambda x: x.dtype == np.int64 and x.shape == (len(table),))

    def check() -> None:
        make = lambda: write_whole(file, lambda out: np.save(out, _read(table)))  # noqa: E731
        labels = cached(read, make, file.parent / digest(file))
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= classes))):
            first, label = int(wrong[0]), int(labels[wrong[0]])
            has = {NONE: "no .cls member", NO_NUMBER: "a .cls member that is no number"}
            raise ValueError(
                f"{field}: {len(wrong)} of {len(labels)} images have no class in range({classes}); the first, "
                f"{table.key(first)} of {table.shard(first)}, has {has.get(label, f'the class {label}')}"
            )

    of_node(check)
    return read()


def _read(table: Table) -> np.ndarray:
    with ThreadPoolExecutor(SCANNERS) as pool:
        parts = list(pool.map(lambda number: _of_shard(table, number), range(len(table.files))))
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _of_shard(table: Table, number: int) -> np.ndarray:
    """int64: those of the samples that a shard has in the table."""
    found: dict[bytes, int] = {}
    with Tar(table.files[number], table.paths[number]) as tar, suppress(DamagedTar):  # what lies before is used
        for name, offset, size, odd in tar:
            key, extension = key_and_extension(name)
            if extension == CLASS and not odd and not hidden(name):
                found[key] = class_of(tar.read(offset, min(size, LONGEST_LABEL)))
    keys = shard_keys(table, number)
    return np.array([found.get(key, NONE) for key in keys], dtype=np.int64)
