"""Pipes give the same global batches in any layout, go on from a few integers, and never deliver halves."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from beit3_dist.config import BatchConfig, RunConfig, Source
from beit3_dist.data import streaming
from beit3_dist.data.batch import MicroBatch, MixedBatches, hash_terms, requests_from
from beit3_dist.data.faults import Fault, OfStorage, StreamFailed, of_storage
from beit3_dist.data.index import IMAGE, TXT, open_table
from beit3_dist.data.joining import micro_batches
from beit3_dist.data.order import Stream
from beit3_dist.data.stateful import StatefulLoader
from beit3_dist.data.streaming import Members, SequentialStream, Shards, command_of, furthest, sequential
from beit3_dist.data.text import TextTokenizer, TokenWindows
from beit3_dist.objectives.registry import objectives_of
from tests.unit.tar_fixtures import image_tar, pair_tar, picture, sentences, small_run, text_tar, write_tar
from tests.unit.test_index import raw_tar

READERS, STEPS, SHARDS = 4, 7, 6


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were to be made before commands were started again."""
    made: list[float] = []
    monkeypatch.setattr(streaming, "sleep", made.append)
    return made


def tokenizer_of(run: RunConfig) -> TextTokenizer:
    return TextTokenizer(run.text_tokenizer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Six shards of 4 to 6 samples per stream, among them broken pictures, an empty caption and a cut shard."""
    folder = tmp_path_factory.mktemp("run")
    config = small_run(folder)
    words = sentences()
    for number in range(SHARDS):
        image_tar(folder / f"some-{number}.tar", 4 + number % 3, seed=10 * number)
        pair_tar(folder / f"two-{number}.tar", 4 + number % 3, seed=10 * number)
        text_tar(folder / f"read-{number}.tar", words[4 * number : 4 * number + 4])
    broken = [{"__key__": "a", "png": picture(500)}, {"__key__": "b", "png": b"no picture"}]
    write_tar(folder / "some-2.tar", [*broken, {"__key__": "c", "png": picture(501)}])
    silent = [{"__key__": "a", "jpg": picture(502), "txt": b" \n"}, {"__key__": "b", "jpg": picture(503)}]
    write_tar(folder / "two-4.tar", [*silent, {"__key__": "c", "jpg": picture(504), "txt": b"a true word"}])
    whole = (folder / "two-5.tar").read_bytes()
    (folder / "two-5.tar").write_bytes(whole[: len(whole) // 2])

    def pipe(name: str) -> str:
        return f"pipe:cat {folder}/{name}-{{0..{SHARDS - 1}}}.tar"

    data = replace(
        config.data,
        images=pipe("some"),
        texts=[Source(shards=pipe("read"), weight=3), Source(shards=pipe("read"), weight=1)],
        pairs=pipe("two"),
        virtual_readers=READERS,
    )
    return replace(config, data=data, batch=BatchConfig(images=8, texts=4, pairs=4))


class Read:
    """Some steps of a run in one layout: what all ranks together have read."""

    def __init__(
        self,
        run: RunConfig,
        world: int = 1,
        workers: int = 0,
        accumulation: int = 1,
        first: int = 0,
        rows: list[list[int]] | None = None,
    ) -> None:
        config = replace(run, batch=replace(run.batch, accumulation=accumulation))
        self.hashes = [0] * (STEPS - first)
        self.rows: list[list[list[int]]] = [rows or []] * (STEPS - first)
        self.faults: list[set[Fault]] = [set() for _ in self.hashes]
        self.batches: list[MicroBatch] = []
        consumed = (first * config.batch.images, first * config.batch.texts, first * config.batch.pairs)
        for rank in range(world):
            batches = MixedBatches(config, 32, rank, world, annotators=[*objectives_of(config)])
            batches.restore(rows or [], first > 0)
            found = micro_batches(batches, requests_from(consumed, config.batch), workers, 2, pin=False)
            for number, batch in enumerate(islice(found, len(self.hashes) * accumulation)):
                step = number // accumulation
                self.hashes[step] = (self.hashes[step] + hash_terms(batch)) % (1 << 64)
                self.rows[step] = furthest([*self.rows[step], *batch.readers.tolist()])
                self.faults[step] |= set(batch.faults)
                self.batches.append(batch)


@pytest.fixture(scope="module")
def reference(run: RunConfig) -> Read:
    return Read(run)


@pytest.mark.parametrize(
    ("world", "workers", "accumulation"), [(2, 0, 1), (4, 0, 1), (1, 1, 2), (1, 3, 1), (2, 3, 2), (2, 2, 1)]
)
def test_global_batches_are_equal(run: RunConfig, reference: Read, world: int, workers: int, accumulation: int) -> None:
    found = Read(run, world, workers, accumulation)
    assert found.hashes == reference.hashes and len(set(found.hashes)) == STEPS
    assert found.faults == reference.faults
    assert found.rows == reference.rows


def test_the_faults_are_told(reference: Read) -> None:
    reasons = {
        (Path(fault.shard).name, fault.key, fault.reason.split(":")[0]) for part in reference.faults for fault in part
    }
    assert reasons >= {
        ("some-2.tar", "b", "undecodable image"),
        ("two-4.tar", "a", "empty caption"),
        ("two-4.tar", "b", "half a sample"),
    }
    assert any(name == "two-5.tar" and reason.startswith("cut at byte") for name, _, reason in reasons)


def test_parts_are_put_together_as_one_process_makes_them(run: RunConfig, reference: Read) -> None:
    found = Read(run, workers=3)
    for ours, theirs in zip(found.batches, reference.batches, strict=True):
        for name, value in vars(theirs).items():
            if isinstance(value, torch.Tensor) and name != "readers":
                assert torch.equal(getattr(ours, name), value), name
    first = found.batches[0].streams
    assert first["images"].tokenizer_images is None and len(first["pairs"]) == 4


@pytest.mark.parametrize("step", range(1, STEPS))
def test_goes_on_in_another_layout(run: RunConfig, reference: Read, step: int) -> None:
    world, workers, accumulation = [(1, 0, 1), (2, 0, 2), (4, 0, 1), (1, 2, 2)][step % 4]
    rows = json.loads(json.dumps(reference.rows[step - 1]))
    found = Read(run, world, workers, accumulation, step, rows)
    assert found.hashes == reference.hashes[step:]
    assert found.faults == reference.faults[step:], "what was told before is not told again"
    assert found.rows == reference.rows[step:]


def test_a_stateful_loader_goes_on(run: RunConfig, reference: Read) -> None:
    def opened(workers: int) -> StatefulLoader:
        return StatefulLoader(MixedBatches(run, 32, 0, 1), workers, 2, pin=False)

    first = opened(2)
    assert [hash_terms(batch) % (1 << 64) for batch in islice(first, 3)] == reference.hashes[:3]
    second = opened(0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [hash_terms(batch) % (1 << 64) for batch in islice(second, STEPS - 3)] == reference.hashes[3:]


def stream_of(run: RunConfig, stream: Stream, batch: int = 8) -> SequentialStream:
    shards = getattr(run.data, stream.name.lower())
    return SequentialStream(stream, shards, run.data, 0, tokenizer_of(run), batch, 0, 1)


def test_a_list_of_fields_reads_the_json(run: RunConfig, tmp_path: Path) -> None:
    """In any order of the members."""
    members = [("txt", b"written"), ("json", b'{"alt": "sign"}'), ("jpg", picture(1))]
    path = raw_tar(
        tmp_path / "a.tar",
        [(f"a.{kind}", data) for kind, data in members] + [(f"b.{kind}", data) for kind, data in members[::-1]],
    )
    for key, expected in ((["caption", "alt"], "sign"), ("alt", "written")):
        data = replace(run.data, caption_key=key, virtual_readers=1)  # type: ignore[arg-type]
        stream = SequentialStream(Stream.PAIRS, f"pipe:cat {path}", data, 0, tokenizer_of(run), 8, 0, 1)
        words = {tokenizer_of(run).decode(stream.read(position).words.tolist()) for position in range(4)}
        assert words == {expected}


def test_every_good_sample_once_per_epoch(run: RunConfig) -> None:
    """27 pictures in six shards, one of them broken; epochs end per reader, and each has its own order."""
    samples = [stream.read(position) for stream in [stream_of(run, Stream.IMAGES)] for position in range(120)]
    first, second = ([sample.index for sample in samples if sample.epoch == epoch] for epoch in (0, 1))
    good = 4 + 5 + 2 + 4 + 5 + 6
    assert len(first) == len(set(first)) == good and set(second) <= set(first)
    assert first != second[: len(first)]
    assert len({sample.id for sample in samples}) == len(samples)


def test_windows_are_those_of_the_index(run: RunConfig, tmp_path: Path) -> None:
    path = text_tar(tmp_path / "t.tar", sentences()[:40])
    tokenizer, length = tokenizer_of(run), run.data.text_length
    windows = TokenWindows(open_table(str(path), "", Stream.TEXTS, str(tmp_path / "cache")), tokenizer, length)
    found = list(Shards(Stream.TEXTS, tokenizer, length - 2).items(f"pipe:cat {path}"))
    assert len(found) == len(windows) > 20
    assert all(np.array_equal(item, windows.read(number)) for number, item in enumerate(found))


def pairs_of(run: RunConfig, address: str) -> Iterator[Members | Fault]:
    for item in Shards(Stream.PAIRS, tokenizer_of(run), 16).items(address):
        assert isinstance(item, Members | Fault)
        yield item


def test_a_shard_cut_anywhere_gives_whole_samples_and_one_fault(run: RunConfig, tmp_path: Path) -> None:
    """Around every block of the tar, and inside; keys that restart in the next shard join nothing."""
    path = pair_tar(tmp_path / "p.tar", 4)
    whole = {item.key: item.content for item in pairs_of(run, f"pipe:cat {path}") if isinstance(item, Members)}
    assert len(whole) == 4
    with tarfile.open(path) as tar:
        end = max(member.offset_data + member.size for member in tar.getmembers())
    counts = []
    for size in sorted({at + more for at in range(0, end, 512) for more in (0, 1, 511)}):
        *items, fault = pairs_of(run, f"pipe:head -c {size} {path}")
        assert isinstance(fault, Fault) and fault.reason.startswith(("cut at byte", "no sample"))
        for item in items:
            assert isinstance(item, Members) and item.content == whole[item.key]
        counts.append(len(items))
    assert counts == sorted(counts) and counts[-1] == 3, "the last sample may have had more members"


def test_a_cut_document_is_left_out(run: RunConfig, tmp_path: Path) -> None:
    documents = ["one two three", "four five six", "seven eight nine"]
    path = write_tar(tmp_path / "t.tar", [{"__key__": "a", "txt": "\n".join(documents).encode()}])
    cut = path.read_bytes().index(b"six")
    tokenizer = tokenizer_of(run)
    window, fault = Shards(Stream.TEXTS, tokenizer, 100).items(f"pipe:head -c {cut} {path}")
    assert tokenizer.decode(window.tolist()) == documents[0] and "is not whole" in fault.reason


def failing(path: Path, size: int, times: str) -> str:
    """A command that fails after `size` bytes, while the file `times` has less than two lines."""
    fail = f"head -c {size} {path}; echo no luck >&2; exit 7"
    script = f"echo >> {times}; if [ $(wc -l < {times}) -le 2 ]; then {fail}; fi; cat {path}"
    return f"pipe:sh -c {shlex.quote(script)}"


def test_a_command_that_fails_is_tried_again(run: RunConfig, tmp_path: Path) -> None:
    path = pair_tar(tmp_path / "p.tar", 4)
    expected = [item.content for item in pairs_of(run, f"pipe:cat {path}")]
    for size in (0, 700, 3000, path.read_bytes().rindex(b"\xff\xd9")):  # in the last picture
        times = tmp_path / f"times-{size}"
        assert [item.content for item in pairs_of(run, failing(path, size, str(times)))] == expected
        assert len(times.read_text()) == 3


def test_pauses_grow_until_the_command_gets_further(run: RunConfig, tmp_path: Path, pauses: list[float]) -> None:
    """Three openings without a byte, a fourth that gets half of the shard, two without one, and a whole one."""
    path = pair_tar(tmp_path / "p.tar", 4)
    expected = [item.content for item in pairs_of(run, f"pipe:cat {path}")]
    times, half = tmp_path / "times", len(path.read_bytes()) // 2
    script = f"""echo >> {times}; case $(wc -l < {times}) in
        1|2|3|5|6) exit 7;; 4) head -c {half} {path}; exit 7;; *) cat {path};; esac"""
    assert [item.content for item in pairs_of(run, f"pipe:sh -c {shlex.quote(script)}")] == expected
    assert pauses == [1, 10, 60, 1, 10, 60]


def test_what_fails_for_good_is_one_fault(run: RunConfig, tmp_path: Path, pauses: list[float]) -> None:
    path = pair_tar(tmp_path / "p.tar", 4)
    script = shlex.quote(f"head -c 3000 {path}; echo no luck >&2; exit 7")
    *items, fault = pairs_of(run, f"pipe:sh -c {script}")
    assert isinstance(fault, OfStorage)
    assert "exit code 7: no luck; what follows is left out after 3 more tries" in fault.reason
    assert pauses == [1, 10, 60]
    assert all(isinstance(item, Members) and {IMAGE, TXT} == item.content.keys() for item in items)
    [missing] = pairs_of(run, f"pipe:cat {tmp_path}/missing.tar")
    assert isinstance(missing, Fault) and "No such file" in missing.reason
    [page] = pairs_of(run, "pipe:echo a page that says that the shard is not here" + " at all" * 100)
    assert isinstance(page, Fault) and "not a plain tar" in page.reason


def test_members_that_lie_apart_or_come_twice_are_refused(run: RunConfig, tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "a.txt", "b.txt", "c.jpg", "c.png", "c.txt", "d.jpg", "d.txt"]
    path = tmp_path / "apart-0.tar"
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            data = name.encode() if name.endswith("txt") else picture(number)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = replace(run.data, virtual_readers=1, pairs=f"pipe:cat {path}")
    stream = SequentialStream(Stream.PAIRS, data.pairs, data, 0, tokenizer_of(run), 1, 0, 1)
    sample = stream.read(0)
    assert tokenizer_of(run).decode(sample.words.tolist()) == "d.txt"
    assert [fault.key for fault in sample.faults] == ["a", "b", "a", "b", "c"]
    assert [fault.reason.split(":")[0] for fault in sample.faults] == ["half a sample"] * 4 + ["a second image member"]


def test_nothing_but_bad_samples_stops_the_run(run: RunConfig, tmp_path: Path) -> None:
    data = replace(run.data, virtual_readers=1, images="pipe:echo a page that says that the shard is not here")
    stream = SequentialStream(Stream.IMAGES, data.images, data, 0, tokenizer_of(run), 1, 0, 1)
    with pytest.raises(StreamFailed, match="100 bad samples in a row in the stream of images.*cut at byte") as stop:
        stream.read(0)
    assert len(stop.value.faults) == 100 and not of_storage(stop.value.faults)


@pytest.mark.parametrize(("shards", "tried"), [("shard.tar", 4), ("shard-{0..9}.tar", 6)])
def test_a_stream_of_which_nothing_works_is_given_up_after_the_first_pauses(
    shards: str, tried: int, run: RunConfig, tmp_path: Path, pauses: list[float]
) -> None:
    times = tmp_path / "times"
    script = f"echo >> {times}; echo credentials have expired >&2; exit 9"
    data = replace(run.data, virtual_readers=1, pairs=f"pipe:sh -c {shlex.quote(script)} {shards}")
    stream = SequentialStream(Stream.PAIRS, data.pairs, data, 0, tokenizer_of(run), 1, 0, 1)
    reason = "exit code 9: credentials have expired"
    with pytest.raises(StreamFailed, match=f"data.pairs: no shard can be read.*{reason}") as stop:
        stream.read(0)
    assert pauses == [1, 10, 60] and len(times.read_text()) == tried
    assert of_storage(stop.value.faults), "so that the run can be started again"


def test_one_shard_that_is_not_there_is_one_fault_only(run: RunConfig, tmp_path: Path, pauses: list[float]) -> None:
    """Also where it is the first that is read."""
    path = pair_tar(tmp_path / "p.tar", 4)
    script = shlex.quote(f"test $0 = {path} && cat {path}")
    shards = f"pipe:sh -c {script} {{{path},{tmp_path}/missing.tar}}"
    data, first = replace(run.data, virtual_readers=1, pairs=shards), 0
    for seed in range(4):
        stream = SequentialStream(Stream.PAIRS, shards, data, seed, tokenizer_of(run), 1, 0, 1)
        samples = [stream.read(number) for number in range(9)]
        faults = sum(len(sample.faults) for sample in samples)
        assert 2 <= faults <= 3 and len(pauses) == 3 * faults, "each is waited for as long as ever"
        pauses.clear()
        first += len(samples[0].faults)
    assert first >= 1


def test_reading_out_of_turn_is_refused(run: RunConfig) -> None:
    stream = stream_of(run, Stream.IMAGES)
    stream.read(0)
    with pytest.raises(RuntimeError, match="sample 2 of virtual reader 0 of images was asked for out of turn"):
        stream.read(2 * READERS)
    with pytest.raises(RuntimeError, match="out of turn"):
        stream_of(run, Stream.IMAGES).read(READERS)


def test_commands_end_with_their_reader(run: RunConfig, tmp_path: Path) -> None:
    path, mark = image_tar(tmp_path / "i.tar", 3), tmp_path / "pid"
    script = shlex.quote(f"echo $$ > {mark}; cat {path}; exec sleep 600")
    items = Shards(Stream.IMAGES, tokenizer_of(run), 16).items(f"pipe:sh -c {script}")
    next(items)
    pid = int(mark.read_text())
    os.kill(pid, 0)
    items.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_addresses_become_commands_without_a_shell() -> None:
    assert command_of("pipe:cat 'a b' $HOME") == ["cat", "a b", "$HOME"]
    assert command_of("https://host/a b;rm.tar")[-1] == "https://host/a b;rm.tar"
    assert {"--connect-timeout", "--speed-limit", "--speed-time"} <= set(command_of("http://host/a.tar"))
    assert command_of("s3://bucket/0.tar") == ["aws", "s3", "cp", "s3://bucket/0.tar", "-"]
    assert sequential("gs://x/{0..3}.tar", "") and not sequential("/data/{0..3}.tar", "")


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"virtual_readers": 3}, 1, "data.virtual_readers=3 does not divide batch.images=8"),
        ({"virtual_readers": 4}, 8, "data.virtual_readers=4 is not divisible by 8 data-parallel ranks"),
        ({"virtual_readers": 8}, 1, "data.virtual_readers=8: .* are 6 shard.* set it to 6 or less"),
        ({"images": "ftp://host/{0..9}.tar"}, 1, "data.images: .* is neither a file nor pipe:COMMAND"),
        ({"images": "pipe:no-such-program {0..9}"}, 1, "data.images: .* needs the command 'no-such-program'"),
        ({"images": "pipe:cat '{0..9}"}, 1, "data.images: .* is no command"),
        ({"images": [Source(shards="pipe:cat a"), Source(shards="a.tar")]}, 1, "data.images: .*cannot be mixed"),
    ],
)
def test_what_does_not_fit_is_named(run: RunConfig, changes: dict, world: int, message: str) -> None:
    batch = BatchConfig(images=8, texts=8, pairs=8)
    with pytest.raises(ValueError, match=message):
        MixedBatches(replace(run, batch=batch, data=replace(run.data, **changes)), 32, 0, world)


def test_what_needs_random_access_is_refused(run: RunConfig) -> None:
    batches = MixedBatches(run, 32, 0, 1)
    with pytest.raises(ValueError, match="data.images has no random access"):
        batches.indexed(Stream.IMAGES)
    with pytest.raises(ValueError, match="data.images has no random access"):
        batches.lengths()
    held_out = replace(run, eval=replace(run.eval, images="pipe:cat x.tar"))
    with pytest.raises(ValueError, match="eval.images: 'pipe:cat x.tar' has no random access"):
        MixedBatches(held_out, 32, 0, 1, held_out=True)


def test_another_number_of_readers_is_refused(run: RunConfig, reference: Read) -> None:
    for readers in (2, 1):
        fewer = MixedBatches(replace(run, data=replace(run.data, virtual_readers=readers)), 32, 0, 1)
        with pytest.raises(ValueError, match=f"data.virtual_readers={readers}: the checkpoint holds 4 readers"):
            fewer.restore(reference.rows[0], started=True)


def test_files_cannot_become_pipes_in_a_run(run: RunConfig) -> None:
    with pytest.raises(ValueError, match="data.images: the checkpoint comes from files"):
        MixedBatches(run, 32, 0, 1).restore([], started=True)


def test_rows_are_small(reference: Read) -> None:
    assert len(reference.rows[-1]) == 4 * READERS  # images, pairs, and two sources of texts
    assert math.prod(np.shape(reference.rows[-1])) == 4 * READERS * 6
