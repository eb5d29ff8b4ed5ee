"""What a tar says of itself is checked: sizes, records, what follows the end; damage is told with its place."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from beit3_dist.data import tars
from beit3_dist.data.cache import cache_folder
from beit3_dist.data.index import expand, open_table, scan
from beit3_dist.data.order import Stream
from beit3_dist.data.tars import DamagedTar, Tar, headers
from beit3_dist.data.unpack import plain_tar
from beit3_dist.opening import open_regular
from tests.unit.tar_fixtures import image_tar


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A member's header with the given size field and a right checksum."""
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    """An extended header that holds these records."""
    return header(b"pax", b"%011o\0" % len(records), b"x") + records + bytes(-len(records) % 512)


def record(key: bytes, value: bytes) -> bytes:
    length = next(
        n for n in range(len(key + value) + 3, len(key + value) + 9) if n == len(key + value) + 3 + len(str(n))
    )
    return b"%d %s=%s\n" % (length, key, value)


def base_256(number: int) -> bytes:
    return number.to_bytes(12, "big", signed=True) if number < 0 else b"\x80" + number.to_bytes(11, "big")


GOOD = header(b"a.txt", b"%011o\0" % 3) + b"one" + bytes(509)
BAD_SIZES = {
    "negative octal": header(b"b.txt", b"-0000001000\0"),
    "negative, base 256": header(b"b.txt", base_256(-1024)),
    "no number": header(b"b.txt", b"size\0"),
    "underscores": header(b"b.txt", b"0000_000_10\0"),
    "a sign": header(b"b.txt", b"+0000000010\0"),
    "no digit of base 8": header(b"b.txt", b"00000000009\0"),
    "larger than the file": header(b"b.txt", base_256(1 << 70)),
    "pax, negative": pax(record(b"size", b"-1024")) + header(b"b.txt", b"00000000003\0"),
    "pax, words": pax(record(b"size", b"large")) + header(b"b.txt", b"00000000003\0"),
    "pax, a number of 5,000 digits": pax(record(b"size", b"9" * 5000)) + header(b"b.txt", b"00000000003\0"),
    "a record of length 0": pax(b"0 path=x\n"),
    "a record of negative length": pax(b"-9 path=x\n"),
    "a record longer than its header": pax(b"900 path=x\n"),
    "a record without a length": pax(b"path=x\n"),
    "an extended header of 2 MB": header(b"pax", b"%011o\0" % (2 << 20), b"x"),
    "a long name of 2 MB": header(b"name", b"%011o\0" % (2 << 20), b"L"),
}


@pytest.mark.parametrize("what", BAD_SIZES)
def test_a_size_that_cannot_be_is_damage(tmp_path: Path, what: str) -> None:
    """What lies before is used; neither is the file read for ever, nor does an error come without the shard's name."""
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + BAD_SIZES[what] + b"two" + bytes(5000))
    found = scan(str(path))
    assert found.places[:, 1].tolist() == [[512, 3]] and found.damage, what


@pytest.mark.parametrize("what", BAD_SIZES)
def test_also_in_a_stream_whose_end_is_not_known(what: str) -> None:
    content = io.BytesIO(GOOD + BAD_SIZES[what] + b"two" + bytes(5000))

    def read(offset: int, size: int) -> bytes:
        assert content.tell() <= offset and size <= tars.CHUNK
        content.seek(offset)
        return content.read(size)

    entries = headers(read, float("inf"), "a command")
    assert next(entries).name == b"a.txt"
    with pytest.raises(DamagedTar):
        list(entries)


def test_many_records_take_no_time(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(pax(b"6 a=b\n" * 170_000 + record(b"path", b"long.txt")) + GOOD + bytes(1024))
    with Tar(str(path)) as tar:
        assert [entry.name for entry in tar] == [b"long.txt"]


def test_a_huge_declared_size_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"a.jpg", base_256(4 << 30)) + bytes(5000))
    tracemalloc.start()
    assert "is not whole" in scan(str(path)).damage
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("padding", [0, 10_240, 3 << 20])
@pytest.mark.parametrize("packed", [False, True])
def test_the_second_half_of_a_joined_tar_is_named(tmp_path: Path, padding: int, packed: bool) -> None:
    first, second = image_tar(tmp_path / "1.tar", 2), image_tar(tmp_path / "2.tar", 3)
    halves = [first.read_bytes() + bytes(padding), second.read_bytes()]
    joined = tmp_path / ("joined.tar.gz" if packed else "joined.tar")
    joined.write_bytes(b"".join(map(gzip.compress, halves) if packed else halves))
    found = scan(plain_tar(str(joined), cache_folder(str(tmp_path / "cache"))))
    assert len(found.places) == 2 and f"more follows at byte {first.stat().st_size + padding}" in found.damage
    assert not scan(str(first)).damage


@pytest.mark.parametrize(
    ("kind", "odd"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a FIFO"),
        (b"S", "a sparse file"),
        (b"M", "a member of type 'M'"),
    ],
)
def test_what_is_no_regular_file_is_left_out_by_its_reason(tmp_path: Path, kind: bytes, odd: str) -> None:
    """Those without content may have a size all the same, as links of some archivers do."""
    size = b"00000000000\0" if kind in b"SM" else b"%011o\0" % 5000
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + header(b"b.jpg", size, kind) + GOOD + bytes(1024))
    with Tar(str(path)) as tar:
        assert [(entry.name, entry.odd) for entry in tar] == [(b"a.txt", ""), (b"b.jpg", odd), (b"a.txt", "")]


def test_sparse_files_of_pax_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(pax(record(b"GNU.sparse.major", b"1")) + GOOD + GOOD + bytes(1024))
    with Tar(str(path)) as tar:
        assert [entry.odd for entry in tar] == ["a sparse file", ""]


def test_folders_of_old_tars_are_no_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"folder.jpg/", b"0", b"\0") + header(b"other.jpg", b"0", b"5") + GOOD + bytes(1024))
    with Tar(str(path)) as tar:
        assert [entry.name for entry in tar] == [b"a.txt"]


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path)
    with pytest.raises(OSError, match="not a regular file"):
        Tar(str(path))


@pytest.mark.parametrize("pattern", ["a.tar", "*.tar", "{a,b}.tar"])
@pytest.mark.parametrize("kind", ["fifo", "device", "dangling link"])
def test_shards_that_are_no_files_are_refused_by_name(tmp_path: Path, pattern: str, kind: str) -> None:
    """A pattern that skipped them would be a smaller data set."""
    image_tar(tmp_path / "b.tar", 1)
    if kind == "fifo":
        os.mkfifo(tmp_path / "a.tar")
    else:
        (tmp_path / "a.tar").symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    with pytest.raises(ValueError, match=r"^data.images: '.*a.tar' is a link to nothing, a FIFO or a device"):
        expand(str(tmp_path / pattern), "data.images")


def test_a_mac_s_copy_of_the_shards_is_not_among_them(tmp_path: Path) -> None:
    for folder in ("data", "__MACOSX/data"):
        (tmp_path / folder).mkdir(parents=True)
        image_tar(tmp_path / folder / "a.tar", 1)
    assert expand(str(tmp_path / "**/*.tar"), "data.images") == [str(tmp_path / "data/a.tar")]
    inside = str(tmp_path / "__MACOSX/data/a.tar")
    assert expand(inside, "data.images") == [inside]


def test_a_fault_of_a_compressed_tar_names_what_the_user_knows(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(GOOD + GOOD + bytes(1024)))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a.tar.gz: key 'a' has a second .txt member$"):
        open_table(str(tmp_path / "a.tar.gz"), "data.texts", Stream.TEXTS, str(tmp_path / "cache"))
