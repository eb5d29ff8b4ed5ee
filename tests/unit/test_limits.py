"""What is huge, or says that it is, takes bounded memory and time, and costs no more than its own sample."""

from __future__ import annotations

import gzip
import io
import logging
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from beit3_dist.data import cache, compressed, lines, text
from beit3_dist.data.faults import BadSample, Fault
from beit3_dist.data.lines import lines_of
from beit3_dist.data.order import Stream
from beit3_dist.data.streaming import Members, Shards
from beit3_dist.data.streams import Origin, PairStream, TextStream
from beit3_dist.data.text import TextTokenizer, documents, pieces_of
from beit3_dist.data.unpack import plain_tar
from beit3_dist.tasks.data.pair_shards import PairShards
from tests.unit.tar_fixtures import image_tar, picture, sentences, text_tar, train_tokenizer
from tests.unit.test_index import raw_tar
from tests.unit.test_tars import base_256, header
from tools import check_shards

HUGE = 60_000_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(str(train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "text.spm")))


def pairs_with(path: Path, kind: str, content: bytes) -> Path:
    """A good pair and one with these captions."""
    return raw_tar(
        path, [("a.png", picture(0)), (f"a.{kind}", content), ("b.png", picture(1)), ("b.txt", b"a small dog")]
    )


def bounded(read: Callable[[], object]) -> object:
    """What is read, within a second of work and 200 MB."""
    tracemalloc.start()
    before = time.process_time()
    try:
        return read()
    finally:
        assert time.process_time() - before < 3
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_a_huge_caption_is_a_bad_sample(tmp_path: Path, tokenizer: TextTokenizer, kind: str) -> None:
    words = b"word " * (HUGE // 5)
    path = pairs_with(tmp_path / "a.tar", kind, b'{"caption": "%s"}' % words if kind == "json" else words)
    stream = PairStream(Origin(str(path), "data.pairs", 0, str(tmp_path / "c")), 10**8, tokenizer, 24, "caption")
    samples = [bounded(lambda position=position: stream.read(position)) for position in range(4)]
    with tarfile.open(path) as tar:
        size = tar.getmember(f"a.{kind}").size
    assert {fault.reason for sample in samples for fault in sample.faults} == {
        f"a caption of {size:,} bytes: no more than 4,194,304 are read"
    }
    found = list(bounded(lambda: list(Shards(Stream.PAIRS, tokenizer, 16).items(f"pipe:cat {path}"))))
    assert isinstance(found[0], Members) and "a caption of" in found[0].problem and not found[1].problem
    examples = PairShards(str(path), str(tmp_path / "c"), tokenizer, "caption")
    with pytest.raises(BadSample, match="a: a caption of"):
        bounded(lambda: examples[0])
    assert examples[1].words
    assert check_shards.main(["--pairs", str(path), "--jobs", "1", "--cache", str(tmp_path / "c")]) == 1


def test_a_long_caption_is_cut_before_it_is_tokenised(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    words = " ".join(sentences())[:3_000_000]
    path = pairs_with(tmp_path / "a.tar", "txt", words.encode())
    origin = Origin(str(path), "data.pairs", 0, str(tmp_path / "c"), shuffled=False)
    stream = PairStream(origin, 10**8, tokenizer, 24, "caption")
    ids = bounded(lambda: stream.read(0)).words.tolist()
    assert ids == [0, *tokenizer.encode(words[:1000])[:22], 2]


def test_pieces_of_a_text_are_tokenised_as_the_text(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = " ".join(sentences()[:60])
    expected = tokenizer.encode(whole)
    assert list(pieces_of("one two three", 5)) == ["one", " two", " three"[:5], "e"]
    assert list(pieces_of("x" * 10, 4)) == ["xxxx", "xxxx", "xx"] and list(pieces_of("", 4)) == [""]
    monkeypatch.setattr(text, "CHARACTERS_AT_ONCE", 300)
    assert "".join(pieces_of(whole, 300)) == whole and tokenizer.encode(whole) == expected
    assert tokenizer.encode_all([whole, "a dog"]) == [expected, tokenizer.encode("a dog")]


def test_texts_are_tokenised_by_characters(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = sentences()[:50]
    path = text_tar(tmp_path / "a.tar", words)
    expected = TextStream(Origin(str(path), "data.texts", 0, str(tmp_path / "1"), shuffled=False), tokenizer, 18)
    monkeypatch.setattr(text, "CHARACTERS_AT_ONCE", 200)
    sizes, encode_all = [], TextTokenizer.encode_all
    monkeypatch.setattr(
        TextTokenizer, "encode_all", lambda self, texts: sizes.append(list(map(len, texts))) or encode_all(self, texts)
    )
    stream = TextStream(Origin(str(path), "data.texts", 0, str(tmp_path / "2"), shuffled=False), tokenizer, 18)
    assert len(sizes) > 5 and all(sum(some) <= 200 or len(some) == 1 for some in sizes)
    assert len(stream) == len(expected)
    for position in range(len(stream)):
        assert np.array_equal(stream.read(position).words, expected.read(position).words)


def test_a_line_without_end_is_one_bad_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 10)
    monkeypatch.setattr(lines, "CHUNK", 3)
    monkeypatch.setattr(text, "LONGEST_LINE", 10)
    (tmp_path / "a").write_bytes(b"good\n" + b"x" * 10 + b"\n" + b"y" * 50 + b"\nlast\n" + b"z" * 40)
    with open(tmp_path / "a", "rb") as file:
        found = list(documents(lines_of(file.readline), jsonl=False))
    assert [(number, str(content)) for number, content in found] == [
        (1, "good"),
        (2, "a line of 11 bytes: no more than 10 are read"),
        (3, "a line of 11 bytes: no more than 10 are read"),
        (4, "last"),
        (5, "a line of 11 bytes: no more than 10 are read"),
    ]


def test_a_sparse_member_of_20_gigabytes(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a text shard: a bad document; as a picture or a caption: a bad sample. (In pieces of 1 MB for the test.)"""
    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(text, "LONGEST_LINE", 1 << 20)
    size = 200_000_000
    for name in ("a.jpg", "a.txt", "a.json"):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(header(name.encode(), base_256(size)))
        with open(path, "ab") as file:
            file.truncate(512 + -(-size // 512) * 512)
            file.seek(0, 2)
            file.write(header(b"b.txt", b"%011o\0" % 3) + b"one" + bytes(509 + 1024))
    stream = bounded(
        lambda: TextStream(Origin(str(tmp_path / "a.txt.tar"), "data.texts", 0, str(tmp_path / "c")), tokenizer, 18)
    )
    assert [(fault.key, fault.reason) for fault in stream.faults] == [
        ("a:1", "a line of 1,048,577 bytes: no more than 1,048,576 are read")
    ]


@pytest.mark.parametrize("name", ["a.jpg", "a.json"])
def test_a_stream_that_declares_gigabytes_costs_one_sample(tmp_path: Path, tokenizer: TextTokenizer, name: str) -> None:
    """The declared size is real in the first case and a lie, cut after some megabytes, in the second."""
    good = image_tar(tmp_path / "good.tar", 2)
    script = tmp_path / "write"
    script.write_bytes(header(name.encode(), base_256(2 << 30)))
    real = f"cat {script}; head -c {2 << 30} /dev/zero; cat {good}"
    lie = f"cat {script}; head -c 5000000 /dev/zero"
    stream = Stream.IMAGES if name == "a.jpg" else Stream.PAIRS
    found = bounded(lambda: list(Shards(stream, tokenizer, 16).items(f"pipe:sh -c '{real}'")))
    assert "2,147,483,648 bytes" in found[0].problem and [item.key for item in found[1:]] == ["0000", "0001"]
    [fault] = bounded(lambda: list(Shards(stream, tokenizer, 16).items(f"pipe:sh -c '{lie}'")))
    assert isinstance(fault, Fault) and "cut at byte 5000512" in fault.reason


def test_an_archive_that_is_made_to_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "FREE", 1 << 20)
    folder = cache.cache_folder(str(tmp_path / "cache"))
    bomb = zlib.compressobj(9, wbits=31)
    (tmp_path / "a.tar.gz").write_bytes(bomb.compress(bytes(100 << 20)) + bomb.flush())
    with pytest.raises(ValueError, match="a.tar.gz unpacks to more than 200 times its size"):
        plain_tar(str(tmp_path / "a.tar.gz"), folder)
    assert not list(folder.glob("*.tar*"))
    small = raw_tar(tmp_path / "b.tar", [(f"{number:06d}.txt", b"a dog") for number in range(20_000)])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(small.read_bytes(), 9))
    assert Path(plain_tar(str(tmp_path / "b.tar.gz"), folder)).read_bytes() == small.read_bytes()


def array() -> bytes:
    """A file of numpy's that holds something else."""
    file = io.BytesIO()
    np.save(file, np.zeros((2, 2)))
    return file.getvalue()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(5000),
    "of another kind": lambda data: array(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".npy", ".json", ".npz", ".tar"])
def test_a_damaged_file_of_the_cache_is_named_and_made_anew(
    tmp_path: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture, suffix: str, damage: str
) -> None:
    """Tables, notes, sidecars, tokens and unpacked tars."""
    path = text_tar(tmp_path / "a.tar", sentences()[:30])
    if suffix == ".tar":
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "a.tar.gz"

    def read() -> list[list[int]]:
        stream = TextStream(Origin(str(path), "data.texts", 0, str(tmp_path / "c")), tokenizer, 18)
        return [stream.read(position).words.tolist() for position in range(len(stream))]

    expected = read()
    damaged = sorted((tmp_path / "c").glob(f"*{suffix}"))
    assert damaged
    for file in damaged:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert read() == expected
    if suffix != ".npz":  # a sidecar is read where a table is made, and then made anew like a stale one
        assert all(f"{file} is damaged" in caplog.text for file in damaged) and "it is made anew" in caplog.text
    caplog.clear()
    assert read() == expected and "damaged" not in caplog.text
