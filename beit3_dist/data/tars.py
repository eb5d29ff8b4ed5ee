"""Tars by their headers alone: where every member lies, and what is wrong with the archive.

Nothing that a header says is believed before it is compared with the file, or with a limit where the length of the file
is not known.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from beit3_dist.data.lines import lines_of
from beit3_dist.opening import open_regular

BLOCK = 512
"""Tars are made of blocks of 512 bytes."""
CHUNK = 1 << 20
LARGEST_MEMBER = 1 << 36
"""Bytes. A larger member of a stream, whose end is not known, would be skipped for hours."""
LARGEST_EXTENSION = 1 << 20
"""Bytes of an extended header: names, times, attributes."""
PADDING = 1 << 26
"""Bytes after the end of an archive that are looked at: more than any tape's record."""
WITHOUT_CONTENT = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}
"""Types of members that are a header alone, whatever size it says; folders (5) are too."""


SPARSE = b"GNU.sparse"
"""How the names of GNU's records of a sparse file begin: its content is a map and the pieces that are no holes."""


class DamagedTar(Exception):
    """The rest of this tar cannot be read."""


class Entry(NamedTuple):
    """A member: all but folders."""

    name: bytes
    offset: int
    size: int
    odd: str = ""
    """What it is instead of a regular file with its content; empty if it is one."""


class Tar:
    """A plain tar. Its entries come in stored order, each as soon as its header is read."""

    def __init__(self, file: str, path: str = "") -> None:
        """`path`: what the user knows the file by. Raises OSError where it cannot be opened or is no regular file."""
        self.path = path or file
        self.file = open_regular(file)

    def __iter__(self) -> Iterator[Entry]:
        """Raises DamagedTar and ValueError as `headers` does."""
        file = self.file.fileno()
        return headers(lambda offset, size: os.pread(file, size, offset), os.fstat(file).st_size, self.path)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, offset)

    def lines(self, offset: int, size: int) -> Iterator[bytes]:
        """Lines of a member, which is never held as a whole."""
        self.file.seek(offset)
        return lines_of(self.file.readline, size)

    def __enter__(self) -> Tar:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def headers(read: Callable[[int, int], bytes], end: float, path: str) -> Iterator[Entry]:
    """The members of a tar that lie wholly inside it. `read(offset, size)` is asked for offsets that only grow; `end`
    is infinite if not known, and then the last member may not be whole.

    Raises DamagedTar where the tar is cut, a header is broken or another tar follows, after all members before that
    place; ValueError if it is no plain tar at all.
    """
    at = 0
    extended: dict[bytes, bytes] = {}
    while True:
        header = read(at, BLOCK)
        if len(header) < BLOCK:
            raise DamagedTar(f"cut at byte {min(end, at + len(header))}: the end-of-archive block is missing")
        if not any(header):
            _check_end(read, at)
            return
        if not _is_header(header):
            if at == 0:
                raise ValueError(
                    f"{path} is not a plain tar; of compressed ones, .tar.gz and .tgz are unpacked into data.cache"
                )
            raise DamagedTar(f"broken member header at byte {at}")
        kind, data = header[156:157], at + BLOCK
        try:
            size = _size(header, extended)
        except ValueError:
            raise DamagedTar(f"broken member header at byte {at}: its size is no number") from None
        if data + size > end:
            raise DamagedTar(f"cut at byte {end}: the member at byte {at} is not whole")
        if size > (LARGEST_EXTENSION if kind in b"xXgLK" else LARGEST_MEMBER):
            raise DamagedTar(f"broken member header at byte {at}: it tells of {size:,} bytes")
        at = data + -(-size // BLOCK) * BLOCK
        if kind in b"xX":
            try:
                extended |= _pax_records(_whole(read(data, size), size, data))
            except ValueError:
                raise DamagedTar(f"broken extended header at byte {data}") from None
        elif kind == b"L":
            extended[b"path"] = _whole(read(data, size), size, data).rstrip(b"\0")
        elif kind not in b"gK":
            name = extended.get(b"path", _name(header))
            odd, extended = _odd(kind, extended), {}
            if not (kind in b"5D" or kind == b"\0" and name.endswith(b"/")):
                yield Entry(name, data, size, odd)


def _number(field: bytes) -> int:
    """A number of a tar header: octal digits, or base 256 after a byte of its own (GNU, from 8 GiB on). Raises
    ValueError for anything else; a negative one is no size."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _digits(field.partition(b"\0")[0].strip(b" ") or b"0", 8)


def _digits(text: bytes, base: int) -> int:
    """The number in a text of nothing but digits; int() takes signs, underscores and spaces, too."""
    if not text.isdigit():
        raise ValueError(f"{text[:20]!r} is no number")
    return int(text, base)


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a header block is right; its own eight bytes count as spaces."""
    try:
        return _number(block[148:156]) == sum(block) - sum(block[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _size(header: bytes, extended: dict[bytes, bytes]) -> int:
    """Bytes of content that follow a header. Raises ValueError where that is no number."""
    if header[156:157] in WITHOUT_CONTENT or header[156:157] == b"5":
        return 0
    return _digits(extended[b"size"], 10) if b"size" in extended else _number(header[124:136])


def _name(header: bytes) -> bytes:
    name = header[:100].rstrip(b"\0")
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].rstrip(b"\0") + b"/" + name
    return name


def _odd(kind: bytes, extended: dict[bytes, bytes]) -> str:
    """What a member of this type is instead of a regular file; empty if it is one."""
    if kind == b"S" or SPARSE in extended:
        return "a sparse file"
    return WITHOUT_CONTENT.get(kind, "" if kind in b"0\0007" else f"a member of type {kind.decode('latin-1')!r}")


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Those of the records `length key=value` of a POSIX extended header that say where a file is, and whether it is
    whole. Raises ValueError where there is no such record."""
    records, at = {}, 0
    while at < len(data):
        space = data.index(b" ", at)
        end = at + _digits(data[at:space], 10)
        if not space < end <= len(data):
            raise ValueError("a record that ends before it begins, or beyond the header")
        key, _, value = data[space + 1 : end].rstrip(b"\n").partition(b"=")
        if key in (b"path", b"size"):
            records[key] = value
        elif key.startswith(SPARSE):
            records[SPARSE] = value
        at = end
    return records


def _whole(data: bytes, size: int, at: int) -> bytes:
    if len(data) < size:
        raise DamagedTar(f"cut at byte {at + len(data)}: the extended header at byte {at} is not whole")
    return data


def _check_end(read: Callable[[int, int], bytes], at: int) -> None:
    """Raises DamagedTar where more than zeros follow the end of an archive at this place."""
    for place in range(at + BLOCK, at + PADDING, CHUNK):
        data = read(place, CHUNK)
        if rest := data.lstrip(b"\0"):
            more = place + len(data) - len(rest)
            raise DamagedTar(
                f"the archive ends at byte {at}, but more follows at byte {more}, as where tars were joined by cat: "
                "make one archive of each"
            )
        if len(data) < CHUNK:
            return
