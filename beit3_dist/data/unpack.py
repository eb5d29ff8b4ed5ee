"""Compressed tars, unpacked once into the cache folder: members of a .tar.gz cannot be read by offset."""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path
from typing import BinaryIO

from beit3_dist.data.cache import digest, locked, write_whole

log = logging.getLogger(__name__)

COMPRESSED = (".tar.gz", ".tgz")
"""What names of compressed tars end in."""
GZIP = 16 + zlib.MAX_WBITS
"""zlib's sign for the format of gzip."""
CHUNK = 1 << 16
"""Bytes that are unpacked at a time."""


def plain_tar(path: str, folder: Path) -> str:
    """The file that holds the plain tar: `path` itself, or its unpacked copy in `folder`, made if there is none of
    this very file. Of an archive that is cut or broken, the copy holds what lies before that place."""
    if not path.lower().endswith(COMPRESSED):
        return path
    stat = os.stat(path)
    name = digest(path)
    target = folder / f"{name}-{stat.st_size}-{stat.st_mtime_ns}.tar"
    if not target.exists():
        with locked(folder / name):
            if not target.exists():
                log.info("unpacking %s", path)
                stale = list(folder.glob(f"{name}-*.tar"))
                write_whole(target, lambda file: _unpack(path, file))
                for old in stale:
                    old.unlink()
    return str(target)


def _unpack(path: str, file: BinaryIO) -> None:
    """Writes the archive's content, of a cut or broken archive what lies before that place."""
    reader = zlib.decompressobj(GZIP)
    problem = "the archive is cut"
    with open(path, "rb") as packed:
        try:
            while data := reader.unused_data or packed.read(CHUNK):
                if reader.eof:  # An archive may consist of several, one after the other.
                    reader = zlib.decompressobj(GZIP)
                file.write(reader.decompress(data))
        except zlib.error as error:
            problem = str(error)
    if file.tell() == 0:
        raise ValueError(f"{path} is no gzip archive: {problem}")
    if not reader.eof:
        log.warning("%s: %s; what lies before is used", path, problem)
