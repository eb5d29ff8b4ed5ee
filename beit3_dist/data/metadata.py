"""What an image file holds beside its pixels: the orientation is used, everything else dropped.

Pillow reads an image's metadata when it opens or loads it, and refuses a whole image where they are odd: a profile
that is broken or large, a megabyte of text, a tag of another type. `without_metadata` leaves of such a file what its
pixels need, and the one tag.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation -> what makes the image upright; it is upright with any other."""
PIXELS_OF_PNG = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PIXELS_OF_TIFF = frozenset(
    (*range(254, 260), 262, 266, 273, ORIENTATION, *range(277, 281), 284, 292, 293, 317, *range(320, 326))
) | {338, 339, 347, *range(512, 522), *range(529, 533)}
"""Tags that the pixels depend on: baseline, strips and tiles, compression, predictor, colours, JPEG."""
EXIF_OF_HEIF = re.compile(rb"(infe[\x02\x03]...(?:..|....)..)Exif", re.DOTALL)
"""The entry of EXIF in the table of an AVIF or HEIF file's items; another type of the same length hides the item."""


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright; None where it is, or where its metadata cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # odd metadata make Pillow raise nearly anything, and an image without them is an image
        return None


def upright(image: Image.Image) -> Image.Image:
    """The loaded image turned as its orientation says."""
    turn = turn_of(image)
    return image if turn is None else image.transpose(turn)


def without_metadata(data: bytes) -> bytes:
    """An image file with what its pixels need and its orientation; the same bytes where nothing else is in it."""
    try:
        if data.startswith(b"\xff\xd8"):
            return b"".join(_jpeg(data))
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return b"".join(_png(data))
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(data)
    except (struct.error, ValueError, IndexError):
        pass  # It ends before it should, or is broken: the decoder says what is wrong.
    return EXIF_OF_HEIF.sub(rb"\1skip", data) if data[4:8] == b"ftyp" else data


def _orientation(exif: bytes) -> int:
    """The orientation in a block of EXIF; 1 where there is none. Other tags are not looked at."""
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (at,) = struct.unpack_from(f"{order}4xL", exif)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, value = struct.unpack_from(f"{order}H6xH", exif, entry)
            if tag == ORIENTATION:
                return value
    except (struct.error, KeyError):
        pass
    return 1


def _exif(orientation: int) -> bytes:
    """A block of EXIF with nothing but the orientation."""
    return struct.pack(">2sHLHHHLHHL", b"MM", 42, 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes) -> Iterator[bytes]:
    """Without the segments of applications and comments before the pixels. Adobe's, which names the colours, stays."""
    yield data[:2]
    at, orientation = 2, 1
    kept: list[bytes] = []
    while data[at + 1] != 0xDA:  # start of scan
        if data[at + 1] == 0xFF:  # a filling byte
            at += 1
            continue
        marker, length = struct.unpack_from(">HH", data, at)
        if marker < 0xFFC0:
            raise ValueError("no marker of a segment")
        segment = data[at : at + 2 + length]
        if marker == 0xFFE1 and segment[4:10] == b"Exif\0\0":
            orientation = _orientation(segment[10:])
        of_colours = marker == 0xFFEE and segment[4:9] == b"Adobe" and length >= 14
        if of_colours or not 0xFFE0 <= marker <= 0xFFEF and marker != 0xFFFE:
            kept.append(segment)
        at += 2 + length
    if orientation in TURNS:
        exif = b"Exif\0\0" + _exif(orientation)
        yield struct.pack(">HH", 0xFFE1, 2 + len(exif)) + exif
    yield from kept
    yield data[at:]


def _png(data: bytes) -> Iterator[bytes]:
    """Without the chunks of text, times, profiles and everything else that no pixel needs."""
    yield data[:8]
    at, orientation = 8, 1
    while at < len(data):
        length, kind = struct.unpack_from(">L4s", data, at)
        chunk = data[at : at + 12 + length]
        if kind == b"eXIf":
            orientation = _orientation(chunk[8:-4])
        if kind == b"IEND" and orientation in TURNS:
            exif = b"eXIf" + _exif(orientation)
            yield struct.pack(">L", len(exif) - 4) + exif + struct.pack(">L", zlib.crc32(exif))
        if kind in PIXELS_OF_PNG:
            yield chunk
        if kind == b"IEND":
            return
        at += len(chunk)


def _tiff(data: bytes) -> bytes:
    """Without the tags of the first image that its pixels do not need, and without the other images."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}4xL", data)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    entries = [data[entry : entry + 12] for entry in range(at + 2, at + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in PIXELS_OF_TIFF]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:at] + directory + data[at + len(directory) :]
