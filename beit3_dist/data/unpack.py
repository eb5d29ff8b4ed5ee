"""Compressed tars, unpacked once into the cache folder: members of a .tar.gz cannot be read by offset."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import BinaryIO

from beit3_dist.data.cache import DamagedCache, cached, digest, parsed, write_whole
from beit3_dist.data.compressed import DamagedArchive, unpacked
from beit3_dist.opening import open_regular

log = logging.getLogger(__name__)

COMPRESSED = (".tar.gz", ".tgz")


def plain_tar(path: str, folder: Path) -> str:
    """The file that holds the plain tar: `path` itself, or its unpacked copy in `folder`, made if there is none of
    this very file. Of an archive that is cut or broken, the copy holds what lies before that place."""
    if not path.lower().endswith(COMPRESSED):
        return path
    status = os.stat(path)
    name = digest(path)
    target = folder / f"{name}-{status.st_size}-{status.st_mtime_ns}.tar"
    length = target.with_suffix(".json")

    def whole() -> str:
        if target.stat().st_size != parsed(length):
            raise DamagedCache(f"{target} is damaged: it has not the {parsed(length)} bytes that were written")
        return str(target)

    def make() -> None:
        log.info("unpacking %s", path)
        stale = [file for file in folder.glob(f"{name}-*") if file not in (target, length)]
        write_whole(target, lambda file: _unpack(path, file))
        unpacked = str(target.stat().st_size).encode()
        write_whole(length, lambda file: file.write(unpacked))
        for old in stale:
            old.unlink()

    return cached(whole, make, folder / name)


def _unpack(path: str, file: BinaryIO) -> None:
    """Writes the archive's content, of a cut or broken archive what lies before that place. Raises ValueError where it
    is none, or one that unpacks to far more than data do."""
    problem = ""
    with open_regular(path) as packed:
        try:
            for part in unpacked(path, packed):
                file.write(part)
        except DamagedArchive as error:
            problem = str(error)
    if file.tell() == 0:
        raise ValueError(f"{path} is no gzip archive: {problem}")
    if problem:
        log.warning("%s: %s; what lies before is used", path, problem)
