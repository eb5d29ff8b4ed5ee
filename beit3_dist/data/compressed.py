"""Compressed files, read as they are unpacked: of one that is made to fill memory or a disk, a part."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, BinaryIO

from beit3_dist.opening import open_regular
from beit3_dist.optional import optional_module

GZIP = 16 + zlib.MAX_WBITS
"""zlib's sign for the format of gzip."""
GZIP_CHUNK, ZSTD_CHUNK = 1 << 16, 1 << 10
"""Packed bytes that are unpacked at a time. What comes of them is in memory, some 64 MB at most: deflate makes a
thousand bytes of one, and zstd a block of 128 KiB of four."""
ZSTD_WINDOW = 1 << 27
"""Bytes (128 MiB) that a zstd file may look back, as the program zstd allows."""
MOST_FOLD, FREE = 200, 1 << 26
"""An archive beyond so many bytes that unpacks to more than so many times its size is made to fill the disk: texts
shrink to a fifth, headers of small members to a fiftieth, zeros to a thousandth."""
ENDS = (".gz", ".zst")


class DamagedArchive(Exception):
    """The rest of this archive cannot be unpacked. The message is the reason."""


def bare(path: str | os.PathLike[str]) -> str:
    """The name of what a file holds: its own, without .gz or .zst."""
    name = os.fspath(path)
    return next((name[: -len(end)] for end in ENDS if name.lower().endswith(end)), name)


def unpacked(path: str, packed: BinaryIO, zstd: bool = False) -> Iterator[bytes]:
    """The content of a gzip or zstd file, piece by piece. Raises DamagedArchive where it is cut or broken, ValueError
    where it unpacks to far more than data do."""
    new, chunk, broken = _zstd() if zstd else (lambda: zlib.decompressobj(GZIP), GZIP_CHUNK, zlib.error)
    most = max(FREE, MOST_FOLD * os.fstat(packed.fileno()).st_size)
    reader, length = new(), 0
    try:
        while data := reader.unused_data or packed.read(chunk):
            if reader.eof:  # A file may consist of several, one after the other.
                reader = new()
            part = reader.decompress(data)
            length += len(part)
            if length > most:
                raise ValueError(f"{path} unpacks to more than {MOST_FOLD} times its size: it holds no data")
            yield part
    except broken as error:
        raise DamagedArchive(str(error)) from None
    if not reader.eof:
        raise DamagedArchive("the archive is cut")


def _zstd() -> tuple[Callable[[], Any], int, type[Exception]]:
    library = optional_module("zstandard", "a .zst file", "pip install -e '.[data]' brings it")
    factory = library.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    return factory.decompressobj, ZSTD_CHUNK, library.ZstdError


class _Unpacked(io.RawIOBase):
    """A compressed file for reading from front to back."""

    def __init__(self, path: str) -> None:
        self.path, self.rest = path, memoryview(b"")  # whose slices are no copies
        self.file = open_regular(path)
        self.parts = unpacked(path, self.file, path.lower().endswith(".zst"))

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        """Raises ValueError where the file is damaged, or made to fill memory."""
        try:
            while not self.rest and (part := next(self.parts, None)) is not None:
                self.rest = memoryview(part)
        except DamagedArchive as error:
            raise ValueError(f"{self.path} is damaged: {error}") from None
        piece, self.rest = self.rest[: len(target)], self.rest[len(target) :]
        target[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        with closing(self.file):
            super().close()


def open_unpacked(path: str | os.PathLike[str]) -> io.BufferedReader:
    """A regular file for reading, unpacked if its name ends in .gz or .zst. Raises OSError as `open_regular` does, and
    ValueError for a tar: its members are not read so."""
    name = os.fspath(path)
    if bare(name) == name:
        return open_regular(name)
    if bare(name).lower().endswith(".tar"):
        raise ValueError(f"{name} is a compressed tar, and no text")
    return io.BufferedReader(_Unpacked(name), GZIP_CHUNK)
