"""A position of a stream is always the same sample; a bad one is replaced alike everywhere and moves no other."""

from __future__ import annotations

import errno
import io
import json
import logging
import pickle
import tarfile
from collections import Counter
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from beit3_dist.config import CaptionField, CaptionKey, DataConfig, Source
from beit3_dist.data import streams
from beit3_dist.data.faults import of_storage
from beit3_dist.data.index import Share
from beit3_dist.data.order import Blocks, Stream, mix, permute, sample_id
from beit3_dist.data.reader import ShardReader
from beit3_dist.data.streams import ImageStream, Origin, PairStream, Sample, TextStream
from beit3_dist.data.text import TextTokenizer
from tests.unit.tar_fixtures import image_tar, pair_tar, picture, sentences, text_tar, train_tokenizer, write_tar

LIMIT = 100_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(str(train_tokenizer(tmp_path_factory.mktemp("model") / "text.spm")))


def images(folder: Path, pattern: str | list[Source] = "*.tar", seed: int = 0, shuffled: bool = True) -> ImageStream:
    shards = str(folder / pattern) if isinstance(pattern, str) else pattern
    return ImageStream(Origin(shards, "data.images", seed, str(folder / "cache"), shuffled), LIMIT)


def pairs(
    folder: Path, tokenizer: TextTokenizer, shuffled: bool = True, length: int = 64, key: CaptionKey = "caption"
) -> PairStream:
    origin = Origin(str(folder / "*.tar"), "data.pairs", 0, str(folder / "cache"), shuffled)
    return PairStream(origin, LIMIT, tokenizer, length, key)


def pixels(stream: ImageStream | PairStream, position: int) -> bytes:
    return stream.read(position).image.tobytes()


def test_images_once_per_epoch(tmp_path: Path) -> None:
    image_tar(tmp_path / "a.tar", 6)
    image_tar(tmp_path / "b.tar", 5, seed=100)
    stream = images(tmp_path)
    assert len(stream) == 11
    epochs = [[stream.read(position) for position in range(11 * epoch, 11 * epoch + 11)] for epoch in range(2)]
    for epoch, samples in enumerate(epochs):
        assert sorted(sample.index for sample in samples) == list(range(11))
        assert {sample.epoch for sample in samples} == {epoch}
        assert len({sample.image.tobytes() for sample in samples}) == 11
        order = [permute(place, 11, mix(0, Stream.IMAGES, epoch)) for place in range(11)]
        assert [sample.index for sample in samples] == order
    assert [sample.index for sample in epochs[0]] != [sample.index for sample in epochs[1]]
    assert epochs[1][3].id == sample_id(Stream.IMAGES, 1, epochs[1][3].index)


def test_reading_depends_on_nothing_read_before(tmp_path: Path) -> None:
    image_tar(tmp_path / "a.tar", 7)
    forward, backward = images(tmp_path), pickle.loads(pickle.dumps(images(tmp_path)))
    ahead = [pixels(forward, position) for position in range(20)]
    assert [pixels(backward, position) for position in reversed(range(20))] == ahead[::-1]
    assert ahead != [pixels(images(tmp_path, seed=1), position) for position in range(20)]


def test_reading_many_is_reading_each(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """Also where the words or the picture cannot be used."""
    samples = [{"__key__": str(number), "jpg": picture(number), "txt": b"a caption"} for number in range(6)]
    samples[1]["txt"], samples[2]["jpg"], samples[3]["txt"], samples[3]["jpg"] = b"\xff", b"junk", b" ", b"junk"
    write_tar(tmp_path / "a.tar", samples)
    one, many = pairs(tmp_path, tokenizer), pairs(tmp_path, tokenizer)

    def content(sample: Sample) -> tuple:
        return sample.id, sample.key, sample.words.tolist(), sample.image.tobytes(), sample.faults

    places = [*range(12), 3]
    found = [content(sample) for sample in many.read_all(places)]
    assert found == [content(one.read(place)) for place in places]
    assert {fault.key for row in found for fault in row[4]} == {"1", "2", "3"}
    assert list(many.read_all([])) == []


def test_unshuffled_is_the_stored_order_in_one_epoch(tmp_path: Path) -> None:
    image_tar(tmp_path / "a.tar", 3)
    stream = images(tmp_path, shuffled=False)
    samples = [stream.read(position) for position in range(7)]
    assert [sample.index for sample in samples] == [0, 1, 2, 0, 1, 2, 0]
    assert samples[1].id == samples[4].id and samples[1].key == samples[4].key


def shown(number: int, kind: str = "PNG") -> bytes:
    """Pixels of a picture of the shards, by its number."""
    return Image.open(io.BytesIO(picture(number, kind=kind))).tobytes()


def damaged(folder: Path, broken: int, count: int = 12) -> None:
    """Shards of `count` pictures, the one numbered `broken` without its second half."""
    samples = [{"__key__": f"{number:04d}", "png": picture(number)} for number in range(count)]
    samples[broken]["png"] = samples[broken]["png"][:50]
    write_tar(folder / "a.tar", samples)


def test_bad_picture_is_replaced_and_moves_no_other(tmp_path: Path) -> None:
    image_tar(tmp_path / "good/a.tar", 12)
    damaged(tmp_path / "bad", broken=4)
    good, bad = images(tmp_path / "good"), images(tmp_path / "bad")
    replaced = 0
    for position in range(36):
        expected, found = good.read(position), bad.read(position)
        if expected.index != 4:
            assert found.id == expected.id and not found.faults
            assert found.image.tobytes() == expected.image.tobytes()
            continue
        replaced += 1
        first = mix(0, Stream.IMAGES, expected.epoch, 4, 1) % 12
        assert found.epoch == expected.epoch and found.index == first != 4
        assert found.id == sample_id(Stream.IMAGES, found.epoch, found.index)
        [fault] = found.faults
        assert (fault.stream, Path(fault.shard).name, fault.key) == ("images", "a.tar", "0004")
        assert fault.reason.startswith("undecodable image")
        assert images(tmp_path / "bad").read(position).faults == found.faults
    assert replaced == 3


def test_only_bad_pictures_stop_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": str(number), "jpg": b"junk"} for number in range(3)])
    with pytest.raises(RuntimeError, match="100 bad samples in a row in the stream of images; the last one is '.'"):
        images(tmp_path).read(0)


def test_storage_that_gives_nothing_more_is_not_blamed_on_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = images(image_tar(tmp_path / "a.tar", 3).parent)
    monkeypatch.setattr("beit3_dist.data.reader.PAUSES", ())
    monkeypatch.setattr("os.pread", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(streams.StreamFailed, match="unreadable shard: Input/output error; see to the storage") as stop:
        stream.read(0)
    assert of_storage(pickle.loads(pickle.dumps(stop.value)).faults), "it comes so out of a loader process"


def test_too_large_pictures_are_replaced(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "png": picture(0, 400, 400)}, {"__key__": "1", "png": picture(1)}])
    stream = images(tmp_path, shuffled=False)
    sample = stream.read(0)
    assert sample.index == 1 and "max_pixels=100000" in sample.faults[0].reason


def test_short_read_is_a_fault(tmp_path: Path) -> None:
    """The file shrinks after it was opened, as on a failing network drive."""
    path = image_tar(tmp_path / "a.tar", 3)
    stream = images(tmp_path, shuffled=False)
    stream.read(0)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[2]
    with open(path, "r+b") as file:
        file.truncate(last.offset_data + 10)
    sample = stream.read(2)
    assert sample.index < 2 and sample.faults[0].reason.startswith("short read: 10 of")


def test_shard_that_disappears_is_replaced_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beit3_dist.data.reader.PAUSES", ())
    image_tar(tmp_path / "a.tar", 6)
    image_tar(tmp_path / "b.tar", 5, seed=100)
    expected = [images(tmp_path).read(position).index for position in range(22)]
    stream = images(tmp_path)
    (tmp_path / "b.tar").unlink()
    for position, index in enumerate(expected):
        sample = stream.read(position)
        assert sample.index == index if index < 6 else sample.index < 6
        assert all(f.reason == "unreadable shard: No such file or directory" for f in sample.faults)
        assert bool(sample.faults) == (index >= 6)


def test_block_shuffle_reads_ahead_and_each_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is announced covers what is read, before it is read; the pictures are those of the index."""
    image_tar(tmp_path / "a.tar", 9)
    image_tar(tmp_path / "b.tar", 10, seed=50)
    plain = images(tmp_path, shuffled=False)
    stored = [plain.read(number).image.tobytes() for number in range(19)]
    stream = ImageStream(
        Origin(str(tmp_path / "*.tar"), "data.images", 0, str(tmp_path / "cache"), blocks=Blocks(2, 6)), LIMIT
    )
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(ShardReader, "expect", lambda self, *place: told.append(place))
    for epoch in range(2):
        samples = []
        for position in range(19 * epoch, 19 * epoch + 19):
            stream.read_ahead(count(position))
            samples.append(stream.read(position))
        assert sorted(sample.index for sample in samples) == list(range(19))
        for sample in samples:
            assert sample.image.tobytes() == stored[sample.index]
            row = stream.tables[0].rows[sample.index]
            offset, size = row["image"]
            assert any(shard == row["shard"] and start <= offset and offset + size <= end for shard, start, end in told)
    other = ImageStream(
        Origin(str(tmp_path / "*.tar"), "data.images", 0, str(tmp_path / "cache"), blocks=Blocks(2, 6)), LIMIT
    )
    assert other.read(30).id == stream.read(30).id


def test_each_rank_asks_for_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks take three samples each in turn. Far neighbours are not joined; all together ask for all, once."""
    image_tar(tmp_path / "a.tar", 24)
    monkeypatch.setattr(streams, "NEAR", 0)
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(ShardReader, "expect", lambda self, *place: told.append(place))
    for rank in range(2):
        stream = ImageStream(
            Origin(str(tmp_path / "a.tar"), "", 0, str(tmp_path / "cache"), blocks=Blocks(4, 8)), LIMIT
        )
        own = [position for position in range(72) if position // 3 % 2 == rank]
        before = len(told)
        for place in range(0, 15, 3):  # up to position 26 or 29, so that the window up to 39 is announced
            stream.read_ahead(iter(own[place:]))
        rows = [stream.tables[0].rows[next(stream.candidates(position))[2]]["image"] for position in own]
        expected = [(0, int(offset), int(offset + size)) for offset, size in rows]
        ends = [place for place, position in enumerate(own) if position < 40]
        assert sorted(told[before:]) == sorted(expected[place] for place in ends)


def test_damaged_shard_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = image_tar(tmp_path / "a.tar", 4)
    path.write_bytes(path.read_bytes()[:-9000])
    for _ in range(2):  # When the index is built, and again when it is found in the cache.
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stream = images(tmp_path)
        assert caplog.text.count("cut at byte") == 1
        [fault] = stream.faults
        assert (fault.stream, fault.shard, fault.key) == ("images", str(path), "") and "cut at byte" in fault.reason


def test_incomplete_pairs_are_counted(
    tmp_path: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            {"__key__": "0", "jpg": picture(0, kind="JPEG"), "txt": b"words"},
            {"__key__": "1", "jpg": b"x"},
            {"__key__": "2", "txt": b"y"},
        ],
    )
    with caplog.at_level(logging.WARNING):
        assert len(pairs(tmp_path, tokenizer)) == 1
    for reason, key in (("no .txt or .json member", "1"), ("no image member", "2")):
        assert f"pairs: 1 left out: {reason}; the first is {key} of {tmp_path / 'a.tar'}" in caplog.text


def test_pairs_are_never_mixed(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    pair_tar(tmp_path / "a.tar", 6)
    pair_tar(tmp_path / "b.tar", 5, seed=100)
    numbers = [*range(6), *range(100, 105)]
    stream = pairs(tmp_path, tokenizer)
    for position in range(22):
        sample = stream.read(position)
        number = numbers[sample.index]
        expected = tokenizer.encode(sentences()[number])[:62]
        assert sample.words.tolist() == [0, *expected, 2]
        assert sample.image.tobytes() == shown(number, "JPEG")


def test_captions_of_txt_and_json(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    good = picture(0)
    write_tar(
        tmp_path / "a.tar",
        [
            {
                "__key__": "0",
                "png": good,
                "txt": b"first caption\n\n second caption\r\n",
                "json": b'{"caption": "unused"}',
            },
            {"__key__": "1", "png": good, "json": json.dumps({"caption": "a single one"}).encode()},
            {"__key__": "2", "png": good, "json": json.dumps({"caption": ["", "left", "right"]}).encode()},
        ],
    )
    stream = pairs(tmp_path, tokenizer)
    seen: dict[int, Counter[str]] = {number: Counter() for number in range(3)}
    for position in range(90):
        sample = stream.read(position)
        seen[sample.index][tokenizer.decode(sample.words.tolist())] += 1
        assert not sample.faults
    assert set(seen[0]) == {"first caption", "second caption"} and min(seen[0].values()) > 5
    assert set(seen[1]) == {"a single one"}
    assert set(seen[2]) == {"left", "right"}
    assert len(stream.read(0).words) <= 64 and len(pairs(tmp_path, tokenizer, length=5).read(0).words) == 5


def test_fields_with_weights(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """One of the fields that a sample has is drawn by weight, then one of its captions, always the same in an epoch;
    the .json goes before the .txt where there are both, and only where a list asks for it."""
    records: list[dict] = [
        {"caption": ["left", "right"], "alt": "sign"},
        {"caption": "house", "alt": None, "more": [" "]},
        {"alt": ["", "tree"], "caption": []},
    ]
    written = [{"json": json.dumps(record).encode(), "txt": b"written"} for record in records] + [{"txt": b"alone"}]
    write_tar(tmp_path / "a.tar", [{"__key__": str(n), "png": picture(0), **some} for n, some in enumerate(written)])
    fields: CaptionKey = [CaptionField(field="caption", weight=3), CaptionField(field="alt"), "more"]

    def drawn(key: CaptionKey, count: int) -> tuple[list[str], list[Counter[str]]]:
        stream = pairs(tmp_path, tokenizer, key=key)
        samples = [stream.read(position) for position in range(count)]
        words = [tokenizer.decode(sample.words.tolist()) for sample in samples]
        assert not any(sample.faults for sample in samples)
        return words, [
            Counter(text for text, s in zip(words, samples, strict=True) if s.index == n) for n in range(len(written))
        ]

    words, seen = drawn(fields, 1600)
    assert words[:40] == drawn(fields, 40)[0]
    assert [set(texts) for texts in seen] == [{"left", "right", "sign"}, {"house"}, {"tree"}, {"alone"}]
    assert abs(seen[0]["left"] - 150) < 40 and abs(seen[0]["right"] - 150) < 40 and abs(seen[0]["sign"] - 100) < 40
    alike = drawn(["caption", "alt"], 1600)[1][0]
    assert abs(alike["sign"] - 200) < 45 and abs(alike["left"] - 100) < 40
    assert [set(texts) for texts in drawn("caption", 40)[1]] == [{"written"}] * 3 + [{"alone"}]
    with pytest.raises(streams.StreamFailed, match="none of the fields 'title', 'name'"):
        write_tar(tmp_path / "a.tar", [{"__key__": "a", "png": picture(0), "json": b"{}"}])
        pairs(tmp_path, tokenizer, key=["title", "name"]).read(0)


@pytest.mark.parametrize(
    ("key", "reason"),
    [([], "list of fields is empty"), (["alt", CaptionField(field="alt")], "twice")],
)
def test_bad_lists_of_fields(key: CaptionKey, reason: str) -> None:
    with pytest.raises(ValueError, match=f"data.caption_key.*{reason}"):
        DataConfig(caption_key=key)
    with pytest.raises(ValueError, match="weight of caption field 'alt'"):
        CaptionField(field="alt", weight=float("nan"))


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        ({"txt": b""}, "empty caption"),
        ({"txt": b" \n "}, "empty caption"),
        ({"txt": b"caf\xe9"}, "invalid UTF-8"),
        ({"txt": "\u200b".encode()}, "empty caption"),
        ({"json": b"{"}, "malformed JSON"),
        ({"json": b"[]"}, "no field 'caption'"),
        ({"json": b'{"caption": [1]}'}, "no field 'caption'"),
        ({"json": b'{"caption": ""}'}, "empty caption"),
        ({"json": b"\xff"}, "invalid UTF-8"),
        ({"json": b'{"caption": "\\ud800"}'}, "invalid UTF-8"),
        ({"json": b'{"caption": "a", "status": "failed_to_resize", "error_message": "x"}'}, "failed_to_resize: x"),
    ],
)
def test_bad_captions_are_replaced(
    tmp_path: Path, tokenizer: TextTokenizer, member: dict[str, bytes], reason: str
) -> None:
    write_tar(
        tmp_path / "a.tar",
        [{"__key__": "bad", "png": picture(0), **member}, {"__key__": "good", "png": picture(1), "txt": b"fine"}],
    )
    sample = pairs(tmp_path, tokenizer, shuffled=False).read(0)
    assert sample.index == 1 and tokenizer.decode(sample.words.tolist()) == "fine"
    assert all(fault.key == "bad" and reason in fault.reason for fault in sample.faults) and sample.faults


def test_weighted_sources_in_exact_proportion_with_their_own_epochs(tmp_path: Path) -> None:
    image_tar(tmp_path / "a.tar", 5)
    image_tar(tmp_path / "b.tar", 7, seed=50)
    sources = [Source(shards=str(tmp_path / "a.tar"), weight=3), Source(shards=str(tmp_path / "b.tar"))]
    stream = images(tmp_path, sources)
    samples = [stream.read(position) for position in range(100)]
    first, second = [s for s in samples if s.index < 5], [s for s in samples if s.index >= 5]
    assert (len(first), len(second), len(stream)) == (75, 25, 12)
    assert Counter(s.epoch for s in first) == Counter({epoch: 5 for epoch in range(15)})
    assert Counter(s.epoch for s in second) == Counter({0: 7, 1: 7, 2: 7, 3: 4})
    assert all(len({s.index for s in first if s.epoch == epoch}) == 5 for epoch in range(15))
    assert all(s.image.tobytes() == shown(s.index if s.index < 5 else 50 + s.index - 5) for s in samples)
    alone = images(tmp_path, "a.tar")
    assert [s.index for s in first] == [alone.read(position).index for position in range(75)]


def test_a_list_of_patterns_is_read_like_one_with_braces(tmp_path: Path) -> None:
    for name, pictures in (("a", 3), ("b", 4)):
        image_tar(tmp_path / f"{name}.tar", pictures)
    listed = images(tmp_path, [str(tmp_path / "a.tar"), str(tmp_path / "b*.tar")])
    braces = images(tmp_path, "{a,b}.tar")
    assert len(listed) == len(braces) == 7
    assert [listed.read(n).index for n in range(20)] == [braces.read(n).index for n in range(20)]


def test_bad_source_lists(tmp_path: Path) -> None:
    image_tar(tmp_path / "a.tar", 1)
    with pytest.raises(ValueError, match="data.images: the list of sources is empty"):
        images(tmp_path, [])
    path = str(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="data.images: the weight 0.0001 is less than"):
        images(tmp_path, [Source(shards=path), Source(shards=path, weight=0.0001)])


def test_texts(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    text_tar(tmp_path / "a.tar", sentences()[:10])
    text_tar(tmp_path / "b.tar", sentences()[10:20])
    shards, cache = str(tmp_path / "*.tar"), str(tmp_path / "cache")
    stream = TextStream(Origin(shards, "data.texts", 0, cache, share=Share(1, 2)), tokenizer, 12)
    samples = [stream.read(position) for position in range(len(stream))]
    assert sorted(sample.index for sample in samples) == list(range(len(stream)))
    assert all(not hasattr(sample, "image") and len(sample.words) <= 12 for sample in samples)
    tokens = sum(len(shard.tokens) for shard in map(stream.windows[0].shard, range(len(stream.windows[0].ends))))
    assert sum(len(sample.words) - 2 for sample in samples) == tokens


def test_text_faults_and_wordless_texts(
    tmp_path: Path, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": "k", "txt": b"\xff\n\xfe\nwords"}])
    with caplog.at_level(logging.WARNING):
        stream = TextStream(Origin(str(tmp_path / "a.tar"), "data.texts", 0, str(tmp_path / "cache")), tokenizer, 12)
    assert [fault.key for fault in stream.faults] == ["k:1", "k:2"]
    assert caplog.text.count("2 documents are left out; the first is k:1 (invalid UTF-8)") == 1
    write_tar(tmp_path / "b.tar", [{"__key__": "k", "txt": b"\n \n"}])
    with pytest.raises(ValueError, match="^data.texts: the documents of .*b.tar .* not one word"):
        TextStream(Origin(str(tmp_path / "b.tar"), "data.texts", 0, str(tmp_path / "cache")), tokenizer, 12)
