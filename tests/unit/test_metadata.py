"""A whole picture is used whatever its metadata are: the orientation counts, and nothing else that they say."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from beit3_dist.data.faults import BadSample
from beit3_dist.data.metadata import without_metadata
from beit3_dist.data.transforms import decode
from beit3_dist.inference import open_image
from beit3_dist.tasks.data.batches import decoded
from tools import build_shards

LIMIT = 100_000_000
MEGABYTE = 1 << 20
RGB = Image.fromarray(np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[:, None, None], 3, 2).repeat(40, 1))
"""40 x 30, darker at the top."""


def saved(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    RGB.save(file, kind, **options)
    return file.getvalue()


def tiff_block(*entries: tuple[int, int, int, bytes], order: str = ">", orientation: int = 6) -> bytes:
    """EXIF with an orientation and other tags: (tag, type, count, value)."""
    tags = [(0x112, 3, 1, struct.pack(f"{order}HH", orientation, 0)), *entries]
    mark = b"MM" if order == ">" else b"II"
    packed = b"".join(struct.pack(f"{order}HHL", *tag[:3]) + tag[3] for tag in tags)
    return mark + struct.pack(f"{order}HLH", 42, 8, len(tags)) + packed + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">HH", marker, len(content) + 2) + content


def jpeg(*segments: bytes) -> bytes:
    plain = saved("JPEG")
    return plain[:2] + b"".join(segments) + plain[2:]


def exif_jpeg(*entries: tuple[int, int, int, bytes]) -> bytes:
    return jpeg(segment(0xFFE1, b"Exif\0\0" + tiff_block(*entries)))


def png(*chunks: tuple[bytes, bytes], broken: bool = False) -> bytes:
    plain = saved("PNG")
    packed = b"".join(
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data) ^ broken)
        for kind, data in chunks
    )
    return plain[:33] + packed + plain[33:]


def tiff(*more: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """An uncompressed TIFF with an orientation and odd tags behind its own."""
    pixels = RGB.tobytes()
    short, long = f"{order}HH", f"{order}L"
    own = [(256, 4, 1, struct.pack(long, 40)), (257, 4, 1, struct.pack(long, 30)),
           (258, 3, 1, struct.pack(short, 8, 0)), (259, 3, 1, struct.pack(short, 1, 0)),
           (262, 3, 1, struct.pack(short, 2, 0)), (273, 4, 1, struct.pack(long, 8)),
           (0x112, 3, 1, struct.pack(short, 6, 0)), (277, 3, 1, struct.pack(short, 3, 0)),
           (278, 4, 1, struct.pack(long, 30)), (279, 4, 1, struct.pack(long, len(pixels)))]  # fmt: skip
    tags = own + list(more)
    packed = b"".join(struct.pack(f"{order}HHL", *tag[:3]) + tag[3] for tag in tags)
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HL", 42, 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", len(tags)) + packed + bytes(4)


def png_text(size: int, **options: object) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * size, **options)
    return saved("PNG", pnginfo=info)


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PACKED = zlib.compress(bytes(MEGABYTE))
LARGE = PROFILE + bytes(3 * MEGABYTE)
ODD = {
    "XResolution as text": (0x11A, 2, 4, b"72\0\0"),
    "Compression out of its range": (0x103, 4, 1, b"\xff\xff\xff\xff"),
    "ImageWidth of -1": (0x100, 9, 1, b"\xff\xff\xff\xff"),
    "a value beyond the end": (0x10F, 2, 5000, b"\0\xff\0\0"),
    "an unknown type": (0x10F, 99, 1, b"\0\0\0\0"),
    "an EXIF folder that is its own": (0x8769, 4, 1, b"\0\0\0\x08"),
    "an EXIF folder beyond the end": (0x8769, 4, 1, b"\0\xff\0\0"),
    "a GPS folder as text": (0x8825, 2, 4, b"gps\0"),
    "a count of four thousand millions": (0x9286, 7, 0xFFFFFFFF, b"\0\0\0\0"),
}
UPRIGHT = {
    "png, broken eXIf": png((b"eXIf", b"garbage!")),
    "webp, broken EXIF": saved("WEBP", lossless=True, exif=b"Exif\0\0garbage"),
    "jpeg, EXIF that ends at once": jpeg(segment(0xFFE1, b"Exif\0\0MM")),
    "jpeg, broken list of pictures (MPF)": jpeg(segment(0xFFE2, b"MPF\0MM\0*\0\0\0\x08\0\x02\0\1\0\2\0\xff")),
    "jpeg, MPF of nothing": jpeg(segment(0xFFE2, b"MPF\0")),
    "jpeg, JFIF without its fields": jpeg(segment(0xFFE0, b"JFIF\0")),
    "jpeg, Photoshop block that ends": jpeg(segment(0xFFED, b"Photoshop 3.0\0008BIM\3\xed\0")),
    "jpeg, Adobe without its fields": jpeg(segment(0xFFEE, b"Adobe")),
    "jpeg, half a profile": jpeg(segment(0xFFE2, b"ICC_PROFILE\0\1\2" + PROFILE)),
    "png, profile that is none": png((b"iCCP", b"name\0\0" + zlib.compress(b"no profile"))),
    "png, profile that cannot be unpacked": png((b"iCCP", b"name\0\0junk")),
    "png, profile packed by an unknown method": png((b"iCCP", b"name\0\7junk")),
    "png, profile of 3 MB": saved("PNG", icc_profile=LARGE),
    "jpeg, profile of 3 MB": saved("JPEG", icc_profile=LARGE),
    "webp, profile of 3 MB": saved("WEBP", lossless=True, icc_profile=LARGE),
    "tiff, profile of 3 MB": saved("TIFF", icc_profile=LARGE),
    "png, text of 3 MB, packed": png_text(3 * MEGABYTE, zip=True),
    "png, text of 3 MB": png_text(3 * MEGABYTE),
    "png, 70 MB of texts, packed": png(*[(b"zTXt", b"k%d\0\0" % n + PACKED) for n in range(70)]),
    "png, international text of 3 MB": png((b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 3 * MEGABYTE))),
    "png, text that cannot be unpacked": png((b"zTXt", b"key\0\0junk")),
    "png, text packed by an unknown method": png((b"zTXt", b"key\0\7junk")),
    "png, a text's wrong checksum": png((b"tEXt", b"key\0text"), broken=True),
    "png, short sRGB, gAMA and pHYs": png((b"sRGB", b""), (b"gAMA", b"\0"), (b"pHYs", b"\0\0")),
    "png, short cHRM": png((b"cHRM", b"\0\0\0")),
    "png, animation of no frames": png((b"acTL", bytes(8))),
}  # fmt: skip
TURNED = {
    **{f"jpeg, {name}": exif_jpeg(entry) for name, entry in ODD.items()},
    **{f"tiff, {name}": tiff((*entry[:3], entry[3][::-1])) for name, entry in ODD.items()},
    **{f"big-endian tiff, {name}": tiff(entry, order=">") for name, entry in ODD.items()},
    **{f"png, {name}": png((b"eXIf", tiff_block(entry))) for name, entry in ODD.items()},
    **{f"webp, {name}": saved("WEBP", lossless=True, exif=tiff_block(entry)) for name, entry in ODD.items()},
    "jpeg, odd EXIF and MPF": exif_jpeg()[:2] + segment(0xFFE2, b"MPF\0") + exif_jpeg()[2:],
    "png, EXIF beside a broken profile": png((b"eXIf", tiff_block()), (b"iCCP", b"name\0\0junk")),
    "png, EXIF behind a text that cannot be unpacked": png((b"zTXt", b"key\0\0junk"), (b"eXIf", tiff_block())),
}  # fmt: skip


def is_ramp(picture: Image.Image, turned: bool) -> bool:
    """Whether it is RGB, as it was or turned to the right; lossy formats may be some levels off."""
    expected = RGB.transpose(Image.Transpose.ROTATE_270) if turned else RGB
    if picture.mode != "RGB" or picture.size != expected.size:
        return False
    return bool(np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).max() <= 6)


@pytest.mark.parametrize("name", [*UPRIGHT, *TURNED])
def test_a_whole_picture_is_used(name: str, tmp_path: Path) -> None:
    """By the loader, by tasks, by inference from a file or from Pillow, and by build_shards."""
    data, turned = (TURNED[name], True) if name in TURNED else (UPRIGHT[name], False)
    path = tmp_path / "a.picture"
    path.write_bytes(data)
    for picture in (decode(data, LIMIT), decoded(path, LIMIT), open_image(path)):
        assert is_ramp(picture, turned) and picture.info == {}
    kept = build_shards.prepared(build_shards.ImageFile(str(path.rename(tmp_path / "a.jpg"))), size=20)
    assert not kept.fault and len(kept.stored) < 10_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(io.BytesIO(data))
        except Exception:
            return  # Nobody can hand this one over.
        try:
            assert is_ramp(open_image(opened), turned)
        except (ValueError, OSError):
            assert without_metadata(data) != data, "Pillow's own object can only be loaded by Pillow"


def test_avif_with_broken_exif() -> None:
    data = saved("AVIF", exif=tiff_block()).replace(tiff_block(), b"garbage!" + bytes(len(tiff_block()) - 8))
    assert decode(data, LIMIT).size in ((40, 30), (30, 40))  # its turn is a property of its own


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_what_is_left_has_the_same_pixels_and_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, "a description"
    data = saved(kind, exif=exif, **({"icc_profile": PROFILE} if kind != "TIFF" else {}))
    plain = without_metadata(data)
    assert b"a description" not in plain or kind == "TIFF"
    assert np.array_equal(np.asarray(decode(plain, LIMIT)), np.asarray(decode(data, LIMIT)))
    assert without_metadata(plain) == plain


def test_colours_that_adobe_names_stay() -> None:
    for mode in ("CMYK", "RGB"):
        file = io.BytesIO()
        RGB.convert(mode).save(file, "JPEG", quality=95, **({"keep_rgb": True} if mode == "RGB" else {}))
        plain = without_metadata(file.getvalue())
        assert np.array_equal(np.asarray(decode(plain, LIMIT)), np.asarray(decode(file.getvalue(), LIMIT)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_cut_pictures_stay_bad(kind: str) -> None:
    """At any place inside: no other error, and no endless search."""
    data = saved(kind)
    for end in range(0, len(data) - len(data) // 3, max(1, len(data) // 40)):
        with pytest.raises(BadSample):
            decode(data[:end], LIMIT)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_formats(kind: str) -> None:
    assert is_ramp(decode(saved(kind, **({"quality": 100} if kind == "AVIF" else {})), LIMIT), turned=False)


def test_heic_is_a_bad_sample_where_pillow_cannot_read_it() -> None:
    with pytest.raises(BadSample, match="undecodable image"):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200), LIMIT)


@pytest.mark.parametrize("head", [b"", saved("PNG")[:40], saved("TIFF")[:100]])
def test_a_huge_file_is_not_read_whole(tmp_path: Path, head: bytes) -> None:
    """20 GB without content, with and without the beginning of a picture."""
    path = tmp_path / "a.png"
    path.write_bytes(head)
    os.truncate(path, 20_000_000_000)
    tracemalloc.start()
    for read in (lambda: decoded(path, LIMIT), lambda: open_image(path)):
        with pytest.raises((BadSample, ValueError), match="an image of 20,000,000,000 bytes"):
            read()
    assert "20,000,000,000 bytes" in build_shards.prepared(build_shards.ImageFile(str(path)), 0).fault
    os.truncate(path, 700_000_000)  # a picture of 100 million pixels may be as large: its header is asked first
    assert head or "undecodable" in build_shards.prepared(build_shards.ImageFile(str(path)), 0).fault
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_pictures_that_are_no_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    for read in (lambda: decoded(path, LIMIT), lambda: open_image(path)):
        with pytest.raises(OSError, match="not a regular file"):
            read()
    assert "not a regular file" in build_shards.prepared(build_shards.ImageFile(str(path)), 0).fault


def test_inference_leaves_the_users_own_picture_as_it_is() -> None:
    own = RGB.copy()
    own.info = {"icc_profile": PROFILE}
    seen = open_image(own)
    assert seen.info == {} and own.info == {"icc_profile": PROFILE} and is_ramp(seen, turned=False)
