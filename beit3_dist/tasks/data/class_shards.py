"""Classes of images in tars, as webdataset has them: an image and a .cls member with the class's number per key."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from beit3_dist.data.cache import cache_folder
from beit3_dist.data.index import SCANNERS, expand
from beit3_dist.data.kinds import IMAGE, KINDS, hidden, key_and_extension
from beit3_dist.data.labels import CLASS, LONGEST_LABEL, class_of
from beit3_dist.data.tars import DamagedTar, Tar
from beit3_dist.data.unpack import plain_tar
from beit3_dist.opening import without_mark
from beit3_dist.tasks.data.examples import Example, TarMember, first_of


@dataclass
class ClassShards(Sequence[Example]):
    """The examples of some tars, in their order."""

    tars: list[str]
    places: np.ndarray
    """int64 [N, 4]: number of the tar, offset and size of the image, class."""
    names: np.ndarray
    """bytes [N]: names of the images."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(f"there is no example {place} of {len(self)}")
        tar, offset, size, label = self.places[place].tolist()
        name = self.names[place].decode("utf-8", "replace")
        return Example(int(place), (TarMember(self.tars[tar], offset, size),), None, label, name)


def read_class_shards(pattern: str, field: str, cache: str, classes: int) -> ClassShards:
    """All examples of the tars that a brace and glob pattern names, every class checked to be in range(classes).
    `cache`: folder for the unpacked copies of compressed tars. Raises ValueError naming `field`, or with one line that
    counts all faults and names the first by tar and key: an evaluation must not lose an example without a word."""
    paths = expand(pattern, field)
    folder = cache_folder(cache)
    with ThreadPoolExecutor(SCANNERS) as pool:
        tars = list(pool.map(lambda path: plain_tar(path, folder), paths))
        scans = list(pool.map(lambda number: _scan(tars[number], paths[number], number, classes), range(len(tars))))
    faults = [fault for scan in scans for fault in scan.faults]
    if faults:
        raise ValueError(f"{field}: {len(faults)} faults: {first_of(faults)}")
    rows = [row for scan in scans for row in scan.rows]
    if not rows:
        raise ValueError(f"{field}: no image with a .cls member in {len(paths)} tars of {pattern!r}")
    return ClassShards(tars, np.array(rows, dtype=np.int64), np.array([name for scan in scans for name in scan.names]))


@dataclass
class _Scan:
    rows: list[tuple[int, int, int, int]]
    names: list[bytes]
    faults: list[str]


def _scan(tar: str, path: str, number: int, classes: int) -> _Scan:
    images: dict[bytes, tuple[int, int, bytes]] = {}
    labels: dict[bytes, bytes] = {}
    faults = []
    with Tar(tar, path) as opened:
        try:
            for name, offset, size, odd in opened:
                key, extension = key_and_extension(name)
                is_image = KINDS.get(extension) == IMAGE
                if hidden(name) or not (is_image or extension == CLASS):
                    continue
                where = f"{path}, key {key.decode('utf-8', 'replace')}"
                if odd:
                    faults.append(f"{where}: the .{extension.decode()} member is {odd}")
                elif key in (images if is_image else labels):
                    faults.append(f"{where}: a second .{extension.decode()} member")
                elif is_image:
                    images[key] = (offset, size, name.rpartition(b"/")[2])
                else:
                    labels[key] = opened.read(offset, min(size, LONGEST_LABEL))
        except DamagedTar as damage:
            faults.append(f"{path}: {damage}")
    rows, names = [], []
    for key in images | labels:  # in the order of the tar
        written = labels.get(key, b"")
        label = class_of(written)
        if key not in images:
            reason = "a .cls member without an image"
        elif key not in labels:
            reason = "an image without a .cls member"
        elif not 0 <= label < classes:
            shown = without_mark(written).strip().decode("utf-8", "replace")
            reason = f"the class {shown[:20]!r} is not in range({classes})"
        else:
            offset, size, base = images[key]
            rows.append((number, offset, size, label))
            names.append(base)
            continue
        faults.append(f"{path}, key {key.decode('utf-8', 'replace')}: {reason}")
    return _Scan(rows, names, faults)
