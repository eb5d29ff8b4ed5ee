"""Streams without random access: shards that come out of a command or an object store, from front to back.

A fixed number V of virtual readers, whatever the ranks and loader processes, reads the shards: sample k of reader v is
at position k * V + v of the stream. In each epoch the shards of a source are put in keyed order, and reader v takes
those at places v, v + V, ... of it. Within a shard the stored order stays, so shards should be shuffled when they are
written. What a reader has to remember is (epoch, shard, samples of it); going on costs reading one shard up to there.

A bad sample is replaced by the reader's next good one. Members of a sample must be neighbours, as webdataset writes
them: what they are joined with is known at once, and halves that lie apart are refused, never mixed.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from time import sleep

import numpy as np
from braceexpand import braceexpand

from beit3_dist.config import DataConfig, Patterns, Source, require, sources_of
from beit3_dist.data import transforms
from beit3_dist.data.captions import LARGEST_CAPTION, captions_of, fields_of, written_as
from beit3_dist.data.faults import BadSample, Fault, OfStorage, StreamFailed, check_size
from beit3_dist.data.index import is_sequential
from beit3_dist.data.kinds import IMAGE, JSON, JSONL, KIND_NAMES, TXT, key_and_kind
from beit3_dist.data.lines import lines_of
from beit3_dist.data.order import Interleave, Stream, mix, permute, tempered
from beit3_dist.data.reduced import Crops
from beit3_dist.data.streams import ATTEMPTS, SOURCE_SHIFT, Sample, all_bad, caption_words
from beit3_dist.data.tars import DamagedTar, headers
from beit3_dist.data.text import TextTokenizer, documents
from beit3_dist.leaving import at_the_end
from beit3_dist.opening import blaming

log = logging.getLogger(__name__)

STALLED = ("--connect-timeout", "30", "--speed-limit", "1", "--speed-time", "60")
"""A server that is silent for a minute has failed: without these options curl waits for ever."""
CURL = ("curl", "--fail", "--silent", "--show-error", "--location", *STALLED)
COMMANDS = {
    "http": (*CURL, "{}"),
    "https": (*CURL, "{}"),
    "s3": ("aws", "s3", "cp", "{}", "-"),
    "gs": ("gsutil", "cat", "{}"),
}
"""What writes a shard to its standard output, by the scheme of its address, as in webdataset."""
PAUSES = (1.0, 10.0, 60.0)
"""Seconds after which a command that failed is started again, until it has got further: an outage of a minute costs
nothing but time."""
CHUNK = 1 << 20
TRIED = 3
"""Shards of a stream that are tried, the second and third one once each, before it is given up where nothing of it has
ever worked: credentials that have expired, a wrong address."""
MESSAGE = 200
"""Characters that are told of a command's last words."""

Row = Sequence[int]
"""Where a virtual reader stands: stream, reader, source, epoch, number of the shard in the reader's epoch, samples of
the shard that are behind it, good and bad."""


class Interrupted(Exception):
    """A command failed before its shard was complete; another try may succeed."""


def sequential(shards: Patterns, field: str) -> bool:
    """Whether a stream's shards are no files. Raises ValueError where some are and some are not."""
    patterns = [source.shards for source in sources_of(shards, field)]
    kinds = {is_sequential(pattern) for pattern in patterns}
    require(len(kinds) != 2, f"{field}: files and others ({', '.join(patterns)}) cannot be mixed in one stream")
    return kinds == {True}


def command_of(address: str) -> list[str]:
    """The command that writes a shard, started without a shell: `pipe:bash -c '...'` where one is wanted."""
    scheme, _, rest = address.partition(":")
    if scheme == "pipe":
        return shlex.split(rest)
    return [part.format(address) for part in COMMANDS[scheme]]


def _known_weights(sources: Sequence[Source], field: str) -> list[float]:
    """The weights that are numbers, as all of a stream's have to be whose samples nobody has counted."""
    numbers = [source.weight for source in sources if source.weight != "samples"]
    require(
        len(numbers) == len(sources),
        f"{field}: how many samples commands and addresses give is unknown: give a number in place of weight: samples",
    )
    return numbers


def addresses(pattern: str, field: str) -> list[str]:
    """The shards that a brace pattern names. Raises ValueError naming `field` where nothing can read them."""
    scheme = pattern.partition(":")[0]
    if scheme != "pipe" and scheme not in COMMANDS:
        raise ValueError(f"{field}: {pattern!r} is neither a file nor pipe:COMMAND nor {':, '.join(COMMANDS)}:")
    with blaming(f"{field}: {pattern!r} is no pattern"):
        found = list(dict.fromkeys(braceexpand(pattern)))
    with blaming(f"{field}: {found[0]!r} is no command"):
        command = command_of(found[0])
    if not command or shutil.which(command[0]) is None:
        raise ValueError(f"{field}: {found[0]!r} needs the command {' '.join(command[:1])!r}, which is not there")
    return found


def furthest(rows: Iterable[Row]) -> list[list[int]]:
    """The last of the rows of each reader and source; readers only ever go on."""
    last: dict[tuple[int, ...], tuple[int, ...]] = {}
    for row in rows:
        reader = tuple(row[:3])
        last[reader] = max(last.get(reader, ()), tuple(row[3:]))
    return [[*reader, *place] for reader, place in sorted(last.items())]


# ------------------------------------------------------------------------------------------------------- one shard


class Pipe:
    """The output of a command, read forwards only."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.words = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.words,
            process_group=0,  # what a shell has started ends with it
        )
        _running.add(self)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.at = 0

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at an offset that lies ahead, fewer at the end. DamagedTar if the end comes before that offset,
        Interrupted if the command has failed."""
        while self.at < offset:
            wanted = min(CHUNK, offset - self.at)
            if len(self._count(self.output.read(wanted), wanted)) < wanted:
                raise DamagedTar(
                    f"cut at byte {self.at}: there should be {offset - self.at:,} more before the next member"
                )
        return self._count(self.output.read(size), size)

    def member(self, offset: int, size: int) -> bytes:
        """A whole member; DamagedTar if the tar ends before."""
        data = self.read(offset, size)
        if len(data) < size:
            raise DamagedTar(f"cut at byte {self.at}: the member at byte {offset} is not whole")
        return data

    def lines(self, offset: int, size: int) -> Iterator[bytes]:
        """The lines of a member, which is never held as a whole; DamagedTar before a line that is not whole."""
        self.read(offset, 0)

        def readline(most: int) -> bytes:
            line = self.output.readline(most)
            if not line.endswith(b"\n") and len(line) < most:
                self._count(line, most)
                raise DamagedTar(f"cut at byte {self.at}: the member at byte {offset} is not whole")
            self.at += len(line)
            return line

        return lines_of(readline, size)

    def _count(self, data: bytes, expected: int) -> bytes:
        self.at += len(data)
        if len(data) < expected and self.process.wait():
            self.words.seek(0)
            said = self.words.read().decode("utf-8", "replace").strip().rpartition("\n")[2][:MESSAGE]
            raise Interrupted(f"{self.command[0]} failed with exit code {self.process.returncode}: {said}")
        return data

    def close(self) -> None:
        self.kill()
        self.process.wait()
        _running.discard(self)
        self.output.close()
        self.words.close()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


_running: set[Pipe] = set()
"""Commands that must not outlive this process."""


def kill_commands() -> None:
    """Ends all commands at once: one that hangs would not notice that nobody reads it any more."""
    for pipe in list(_running):
        pipe.kill()


at_the_end.append(kill_commands)


@dataclass
class Members:
    """Neighbouring members of one key: a sample before it is decoded."""

    key: str
    content: dict[int, bytes] = field(default_factory=dict)
    problem: str = ""

    def add(self, kind: int, data: bytes, problem: str) -> None:
        if kind in self.content:
            problem = f"a second {KIND_NAMES[kind]} member"
        self.problem = self.problem or problem
        self.content[kind] = data


class Silent(OfStorage):
    """A shard of which nothing came but its command's error."""


Item = Members | np.ndarray | Fault
"""What a shard consists of: samples' members, or windows of tokens; and what is wrong between them."""


@dataclass(frozen=True)
class Shards:
    stream: Stream
    tokenizer: TextTokenizer
    width: int
    """Tokens of a text's window, <s> and </s> not counted."""
    max_pixels: int = DataConfig.max_pixels

    def items(self, address: str, patient: bool = True) -> Iterator[Item]:
        """All of a shard, in stored order. A command that fails is started again after a pause, where one is `patient`,
        and goes on where it failed; what is lost after some tries, and what a cut tar lacks, is one fault."""
        waits = PAUSES if patient else ()
        done, pauses = 0, iter(waits)
        while True:
            before, problem, kind = done, "", Fault
            with closing(Pipe(command_of(address))) as pipe:
                try:
                    for number, item in enumerate(self._once(pipe, address)):
                        if number == done:
                            done += 1
                            yield item
                except Interrupted as error:
                    problem = str(error)
            if problem:
                if done > before:
                    pauses = iter(waits)
                if seconds := next(pauses, 0.0):
                    log.warning("%s: %s; another try in %g s", address, problem, seconds)
                    sleep(seconds)
                    continue
                problem += f"; what follows is left out after {len(waits)} more tries"
                kind = OfStorage if done else Silent
            elif not done:
                problem = "no sample in this shard"
            if problem:
                yield kind(self.stream.field, address, "", problem)
            return

    def _once(self, pipe: Pipe, address: str) -> Iterator[Item]:
        """The items up to the end, to damage, which is the last item, or to an interruption, which is raised."""
        try:
            yield from self._windows(pipe, address) if self.stream is Stream.TEXTS else self._samples(pipe, address)
        except (DamagedTar, ValueError) as damage:
            yield Fault(self.stream.field, address, "", f"{damage}; what lies before is used")

    def _samples(self, pipe: Pipe, address: str) -> Iterator[Item]:
        """Images, or images with captions. The last ones before a cut are left out: more may have followed."""
        kinds = (IMAGE,) if self.stream is Stream.IMAGES else (IMAGE, TXT, JSON)
        current: Members | None = None
        for name, offset, size, odd in headers(pipe.read, math.inf, address):
            key, kind = key_and_kind(name)
            if kind is None or kind not in kinds:
                continue
            text, problem = key.decode("utf-8", "replace"), odd and f"the {KIND_NAMES[kind]} member is {odd}"
            try:
                if kind == IMAGE:
                    check_size("an image", size, transforms.largest_file(self.max_pixels))
                else:
                    check_size("a caption", size, LARGEST_CAPTION)
            except BadSample as bad:
                problem = str(bad)
            data = b"" if problem else pipe.member(offset, size)
            if current is None or current.key != text:
                if current is not None:
                    yield current
                current = Members(text)
            current.add(kind, data, problem)
        if current is not None:
            yield current

    def _windows(self, pipe: Pipe, address: str) -> Iterator[Item]:
        """Windows of the shard's tokens as an index has them: documents separated by </s>, a shorter last window."""
        tokens: list[int] = []
        started, frame = False, ([self.tokenizer.bos], [self.tokenizer.eos])

        def window(words: list[int]) -> np.ndarray:
            return np.array([*frame[0], *words, *frame[1]], dtype=np.int64)

        try:
            for name, offset, size, odd in headers(pipe.read, math.inf, address):
                key, kind = key_and_kind(name)
                if kind not in (TXT, JSONL):
                    continue
                if odd:
                    yield Fault("texts", address, key.decode("utf-8", "replace"), odd)
                    continue
                for line, text in documents(pipe.lines(offset, size), kind == JSONL):
                    if isinstance(text, BadSample):
                        yield Fault("texts", address, f"{key.decode('utf-8', 'replace')}:{line}", str(text))
                        continue
                    ids = self.tokenizer.encode(text)
                    tokens += frame[1] * (started and bool(ids)) + ids
                    started |= bool(ids)
                    whole = len(tokens) // self.width * self.width
                    for first in range(0, whole, self.width):
                        yield window(tokens[first : first + self.width])
                    del tokens[:whole]
        except (DamagedTar, ValueError):
            if tokens:
                yield window(tokens)
            raise
        if tokens:
            yield window(tokens)


# --------------------------------------------------------------------------------------------------------- a stream


class SequentialStream:
    """Images, texts or pairs of shards without random access: `read(position)`, for each reader's positions in turn."""

    def __init__(
        self,
        stream: Stream,
        shards: Patterns,
        data: DataConfig,
        seed: int,
        tokenizer: TextTokenizer,
        batch: int,
        rank: int,
        world: int,
        crops: Crops | None = None,
    ) -> None:
        """`batch`: samples of a step over all ranks. `crops`: what images are decoded for; None: they are decoded
        whole. Raises ValueError naming the field that does not fit."""
        name, readers = stream.field, data.virtual_readers
        sources = sources_of(shards, f"data.{name}")
        self.stream, self.data, self.seed, self.tokenizer, self.crops = stream, data, seed, tokenizer, crops
        self.fields = fields_of(data.caption_key)
        self.shards = [addresses(source.shards, f"data.{name}") for source in sources]
        for source in self.shards:
            require(
                len(source) >= readers,
                f"data.virtual_readers={readers}: {source[0]!r} and its fellows are {len(source)} shard(s) of "
                f"data.{name}; each reader needs one, so set it to {len(source)} or less",
            )
        require(batch % readers == 0, f"data.virtual_readers={readers} does not divide batch.{name}={batch}")
        require(readers % world == 0, f"data.virtual_readers={readers} is not divisible by {world} data-parallel ranks")
        self.weights = tempered(_known_weights(sources, f"data.{name}"), getattr(data.temperature, name))
        with blaming(f"data.{name}"):
            self.interleave = Interleave(self.weights)
        share = readers // world
        self.readers = own = range(rank * share, (rank + 1) * share)
        self.own = [place for place in range(batch) if place % readers in own]
        """This rank's places in a step's global batch: those of its readers."""
        self.faults: list[Fault] = []
        self.works, self.silent = False, 0
        """Whether anything of the stream was read in this process; shards that gave nothing but an error."""
        self.restore([], started=False)

    def places(self, first: int, count: int, part: int, parts: int) -> list[int]:
        """Of `count` of this rank's places in a step, from its `first` on, those of one of `parts` loader processes:
        each process owns its readers for good."""
        readers = self.data.virtual_readers
        return [place for place in self.own[first : first + count] if place % readers % parts == part]

    def restore(self, rows: Iterable[Row], started: bool) -> None:
        """Goes on from the rows of all readers; from the beginning where there is none. Raises ValueError for those of
        another number of readers, or for none although the run has `started`."""
        self.rows = {(row[1], row[2]): tuple(row[3:]) for row in rows if row[0] == self.stream}
        self.open: dict[tuple[int, int], Iterator[tuple[int, int, int, int, Item]]] = {}
        self.taken: dict[int, int] = {}
        known, readers = {reader for reader, _ in self.rows}, self.data.virtual_readers
        name = self.stream.field
        require(
            bool(known) or not started,
            f"data.{name}: the checkpoint comes from files; a stream cannot lose its random access within a run",
        )
        require(
            not known or known.issuperset(self.readers) and max(known) < readers,
            f"data.virtual_readers={readers}: the checkpoint holds {len(known)} readers of {name}; keep their number",
        )

    def positions(self) -> list[list[int]]:
        """The rows of the readers that were read here."""
        return [[self.stream, reader, source, *self.rows[reader, source]] for reader, source in self.open]

    def read(self, position: int) -> Sample:
        """The sample at the next position of its reader; RuntimeError for another, StreamFailed after 100 bad ones in a
        row or where no command of the stream has ever worked."""
        reader, number = position % self.data.virtual_readers, position // self.data.virtual_readers
        if self.taken.setdefault(reader, number) != number or (number and not self.rows):
            raise RuntimeError(
                f"sample {number} of virtual reader {reader} of {self.stream.field} was asked for out of turn"
            )
        self.taken[reader] += 1
        source, _ = self.interleave.locate(number)
        items = self.open.setdefault((reader, source), self._items(reader, source))
        faults: list[Fault] = []
        for _ in range(ATTEMPTS):
            epoch, turn, shard, place, item = next(items)
            self.rows[reader, source] = (epoch, turn, place + 1)
            if isinstance(item, Fault):
                faults.append(item)
                self.silent += isinstance(item, Silent)
                if not self.works and self.silent >= min(TRIED, len(self.shards[source])):
                    name = self.stream.field
                    raise StreamFailed(f"data.{name}: no shard can be read: {item.shard}: {item.reason}", faults)
                continue
            self.works = True
            index = mix(source, shard, place)
            sample = Sample(self.stream, epoch, index, mix(self.seed, self.stream, epoch, index), faults, source)
            try:
                self._load(item, sample)
                return sample
            except BadSample as bad:
                key = item.key if isinstance(item, Members) else f"window {place}"
                faults.append(Fault(self.stream.field, self.shards[source][shard], key, str(bad)))
        raise all_bad(self.stream, faults)

    def read_all(self, positions: Sequence[int]) -> Iterator[Sample]:
        return map(self.read, positions)

    def shared(self, first: int, count: int) -> list[int]:
        """How many of `count` samples from a position on are of each source."""
        return self.interleave.counts(np.arange(first, first + count) // self.data.virtual_readers).tolist()

    def _items(self, reader: int, source: int) -> Iterator[tuple[int, int, int, int, Item]]:
        """Epoch, turn of the shard, its number, place in it and item, without end, from where the reader stands."""
        names, readers = self.shards[source], self.data.virtual_readers
        shards = Shards(self.stream, self.tokenizer, self.data.text_length - 2, self.data.max_pixels)
        epoch, turn, behind = self.rows.get((reader, source), (0, 0, 0))
        while True:
            while (at := reader + turn * readers) < len(names):
                key = mix(self.seed, self.stream + (source << SOURCE_SHIFT), epoch)
                shard = permute(at, len(names), key)
                for place, item in enumerate(shards.items(names[shard], patient=self.works or not self.silent)):
                    if place >= behind:
                        yield epoch, turn, shard, place, item
                turn, behind = turn + 1, 0
            epoch, turn = epoch + 1, 0

    def _load(self, item: Members | np.ndarray, sample: Sample) -> None:
        if isinstance(item, np.ndarray):
            sample.words = item
            return
        if item.problem:
            raise BadSample(item.problem)
        if IMAGE not in item.content:
            raise BadSample("half a sample: no image member beside it")
        if self.stream is Stream.PAIRS:
            kind = written_as(item.content, self.fields)
            if kind is None:
                raise BadSample("half a sample: no .txt or .json member beside it")
            captions = captions_of(item.content[kind], kind, self.fields)
            sample.words = caption_words(captions, sample, self.tokenizer, self.data.caption_length)
        sample.decode(item.content[IMAGE], self.data.max_pixels, self.crops)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "open": {}, "taken": {}}
