"""The three streams: `read(position)` gives the sample of any position, at once and always the same.

A sample that cannot be used is replaced by a keyed probe of the same epoch, so that later positions do not move and
every layout replaces it alike. Once per epoch holds for the scheduled samples; the hash of a step covers the delivered
ones.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import accumulate, chain, takewhile
from typing import ClassVar

import numpy as np

from beit3_dist.config import CaptionKey, Patterns, sources_of
from beit3_dist.data import transforms
from beit3_dist.data.captions import Captions, fields_of, json_first, read_captions
from beit3_dist.data.faults import BadSample, Fault, StreamFailed, check_size, of_storage
from beit3_dist.data.index import ALONE, Share, Table, open_table
from beit3_dist.data.kinds import LeftOut
from beit3_dist.data.labels import labels_of
from beit3_dist.data.order import (
    Blocks,
    Interleave,
    Stream,
    generator,
    mix,
    mix_of_many,
    mix_on,
    sample_id,
    scheduled,
    tempered,
)
from beit3_dist.data.reader import ShardReader
from beit3_dist.data.reduced import Crops, Decoded
from beit3_dist.data.text import TextTokenizer, TokenWindows
from beit3_dist.looking import of_node
from beit3_dist.opening import blaming

log = logging.getLogger(__name__)

ATTEMPTS = 100
"""Samples that are tried for one position before the run stops."""
SOURCE_SHIFT = 8
"""Each source of a stream has its own order: the stream's number with the source's number above these bits."""
NEAR = 1 << 16
"""Bytes between two members that are rather read than skipped."""


class Draw(IntEnum):
    """What random numbers of a sample are for; each use has its own, so that a change in one does not move another."""

    VIEW = 0
    IMAGE_MASK = 1
    WORD_MASK = 2
    CAPTION = 3
    MASKED_SIDE = 4
    JITTER = 5


@dataclass
class Sample:
    """A delivered sample, before augmentation and masking."""

    stream: Stream
    epoch: int
    index: int
    """Number of the sample in the stream, over all sources."""
    key: int
    """Key of everything that is drawn for it: hash of (seed, stream, epoch, index)."""
    faults: list[Fault]
    """Samples that were tried for this position before."""
    source: int = 0
    """Number of its source in the stream."""
    image: Decoded = field(init=False, repr=False)
    """RGB image; images and pairs have one."""
    encoded: bytes = field(default=b"", repr=False)
    """The file of the image."""
    image_hash: int = 0
    """Of this file, where an annotator wants it: equal images have equal ones."""
    label: int = -1
    """The class of an image alone, where an annotator wants it."""
    words: np.ndarray = field(init=False, repr=False)
    """int64 ids of the text or the caption, <s> and </s> included; texts and pairs have them."""

    @property
    def id(self) -> int:
        """Signed 64-bit name of (stream, epoch, index)."""
        return sample_id(self.stream, self.epoch, self.index)

    def generator(self, use: Draw) -> np.random.Generator:
        return generator(self.key, use)

    def decode(self, data: bytes, max_pixels: int, crops: Crops | None) -> None:
        """Gives the sample the image in a file's bytes, for the crop that is drawn for it; None: whole. BadSample
        where there is none."""
        self.encoded = data
        if crops is None:
            self.image = transforms.decode(data, max_pixels)
            return
        self.image = transforms.decode_for(
            data,
            max_pixels,
            crops.side,
            lambda width, height: transforms.crop_box(width, height, crops.min_scale, self.generator(Draw.VIEW)),
        )


@dataclass(frozen=True)
class Origin:
    """Where a stream's samples come from, and in which order."""

    shards: Patterns
    field: str
    """What an error calls the shards."""
    seed: int
    cache: str
    shuffled: bool = True
    """False: every epoch is the first one, in stored order."""
    blocks: Blocks | None = None
    """Shuffles by blocks and windows instead of fully."""
    share: Share = ALONE
    """Of the work on shards that are new."""
    json_first: bool = False
    """Whether a pair's captions are those of its .json member where there is a .txt, too."""
    temperature: float = 1.0
    """Of the sources' weights."""


class SampleStream(ABC):
    """Order, epochs, weighted sources and replacement, which all streams have in common."""

    stream: ClassVar[Stream]

    def __init__(self, origin: Origin) -> None:
        """Opens (or builds) the index of each source. Raises ValueError where one has no file or no usable sample."""
        field, cache, share = origin.field, origin.cache, origin.share
        sources = sources_of(origin.shards, field)
        self.seed, self.shuffled, self.blocks = origin.seed, origin.shuffled, origin.blocks
        self.window: int | None = None
        self.tables = [
            open_table(source.shards, field, self.stream, cache, share, origin.json_first) for source in sources
        ]
        self.readers = [ShardReader(table) for table in self.tables]
        self.faults = [fault for table in self.tables for fault in self._report(table)]
        """What is wrong with whole shards and, for texts, with documents."""
        self._field, self._sources, self._temperature = field, sources, origin.temperature

    def _report(self, table: Table) -> list[Fault]:
        """Logs what the index of a source left out, and returns the faults of its shards."""
        notes, name = of_node(lambda: table.notes), self.stream.field
        for shard, damage in notes["damage"]:
            log.warning("%s: %s: %s", name, shard, damage)
        total: LeftOut = {}
        for shard, left_out in notes["left_out"]:
            for reason, (count, first) in left_out.items():
                before, example = total.get(reason, (0, f"{first} of {shard}"))
                total[reason] = before + count, example
        for reason, (count, first) in total.items():
            told = "%s: %d left out: %s; the first is %s (tools/check_shards.py counts them by shard)"
            log.warning(told, name, count, reason, first)
        return [Fault(name, shard, "", damage) for shard, damage in notes["damage"]]

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.starts = [0, *accumulate(self.lengths)]
        asked = [s.weight if s.weight != "samples" else float(n) for s, n in zip(self._sources, lengths, strict=True)]
        self.weights = tempered(asked, self._temperature)
        """Of the sources, as the temperature leaves them."""
        with blaming(self._field):
            self.interleave = Interleave(self.weights)

    def shared(self, first: int, count: int) -> list[int]:
        """How many of `count` samples from a position on are of each source."""
        return self.interleave.counts(np.arange(first, first + count)).tolist()

    def __len__(self) -> int:
        """Samples of one epoch of every source."""
        return self.starts[-1]

    def read(self, position: int) -> Sample:
        """The sample at a position of the endless stream; raises StreamFailed after 100 bad ones in a row."""
        return next(self.read_all([position]))

    def read_all(self, positions: Sequence[int]) -> Iterator[Sample]:
        """The samples at these positions, each image read when its sample is asked for. All are looked up, and their
        words read, before the first image: between images, whose pixels drive all else out of the caches, that takes
        four times as long."""
        readings = [self._reading(position) for position in positions]
        for reading in readings:
            next(reading)
        for reading in readings:
            sample = next(reading)
            assert sample is not None
            yield sample

    def _reading(self, position: int) -> Iterator[Sample | None]:
        """Stops before the first image; then comes the sample of the position."""
        faults: list[Fault] = []
        begun = False
        for source, epoch, chosen in self.candidates(position):
            index = self.starts[source] + chosen
            key = mix_on(mix_of_many(self.seed, self.stream, epoch), index)
            sample = Sample(self.stream, epoch, index, key, faults, source)
            try:
                self._load_words(source, chosen, sample)
                if not begun:
                    begun = True
                    yield None
                self._load_image(source, chosen, sample)
            except BadSample as bad:
                table = self.tables[source]
                faults.append(Fault.of(bad, self.stream.field, table.shard(chosen), table.key(chosen)))
                continue
            yield sample
            return
        raise all_bad(self.stream, faults)

    def read_ahead(self, upcoming: Iterator[int]) -> None:
        """Where the stream is shuffled by blocks: asks the system, when a window of it begins, for the samples of the
        next one, and of the first one, too. `upcoming`: the positions that this process reads, ascending and without
        end. Other ranks and loader processes ask for theirs, so that each sample is fetched once."""
        if not self.blocks or not self.shuffled:
            return
        first, length = next(upcoming), self.blocks.window
        window = first // length
        if window == self.window:
            return
        begin = first if self.window is None else (window + 1) * length
        self.window = window
        wanted: dict[int, list[int]] = {}
        for position in takewhile(lambda position: position < (window + 2) * length, chain([first], upcoming)):
            if position >= begin:
                source, _, chosen = next(self.candidates(position))
                wanted.setdefault(source, []).append(chosen)
        for source, samples in wanted.items():
            self._expect(source, sorted(samples))

    def _expect(self, source: int, samples: list[int]) -> None:
        """Announces the reading of samples of a source, of neighbours in one piece."""
        rows = self.tables[source].rows[samples]
        places = np.stack([rows["image"], rows["text"]], axis=1)
        starts = np.where(places[..., 1] > 0, places[..., 0], np.iinfo(np.int64).max).min(axis=1)
        ends = np.where(places[..., 1] > 0, places.sum(axis=2), 0).max(axis=1)
        near = (rows["shard"][1:] == rows["shard"][:-1]) & (starts[1:] - ends[:-1] <= NEAR)
        pieces = np.flatnonzero(np.concatenate([[True], ~near]))
        begins, ends = np.minimum.reduceat(starts, pieces), np.maximum.reduceat(ends, pieces)
        for shard, begin, end in zip(rows["shard"][pieces], begins, ends, strict=True):
            self.readers[source].expect(int(shard), int(begin), int(end))

    def candidates(self, position: int) -> Iterator[tuple[int, int, int]]:
        """Source, epoch and number in the source of the scheduled sample of a position, then of those that replace it.
        The first one that can be used is delivered."""
        source, place = self.interleave.locate(position) if len(self.tables) > 1 else (0, position)
        length, order = self.lengths[source], self.stream + (source << SOURCE_SHIFT)
        epoch, first = scheduled(place, length, self.seed, order, self.blocks) if self.shuffled else (0, place % length)
        yield source, epoch, first
        for attempt in range(1, ATTEMPTS):
            yield source, epoch, mix(self.seed, order, epoch, first, attempt) % length

    def names_and_sizes(self) -> list[list[tuple[str, int]]]:
        """Of the shards of each source, wherever they lie."""
        return [
            [(os.path.basename(path), size) for path, (size, _) in zip(table.paths, table.marks, strict=True)]
            for table in self.tables
        ]

    @abstractmethod
    def _load_words(self, source: int, index: int, sample: Sample) -> None:
        """Gives the sample the words, if any, of number `index` of the source; BadSample where they cannot be used."""

    @abstractmethod
    def _load_image(self, source: int, index: int, sample: Sample) -> None:
        """Gives the sample its image, if any; BadSample where it cannot be used."""


def all_bad(stream: Stream, faults: list[Fault]) -> StreamFailed:
    """What ends the run when all samples that were tried for a position are bad."""
    last = faults[-1]
    remedy = (
        "see to the storage, then go on with --checkpoint.resume auto" if of_storage(faults)
        else "tools/check_shards.py lists what is wrong with shards"
    )  # fmt: skip
    return StreamFailed(
        f"{len(faults)} bad samples in a row in the stream of {stream.field}; the last one is {last.key!r} of "
        f"{last.shard}: {last.reason}; {remedy}",
        faults,
    )


class StreamWithImages(SampleStream):
    def __init__(self, origin: Origin, max_pixels: int, crops: Crops | None = None) -> None:
        """`crops`: what images are decoded for; None: they are decoded whole."""
        super().__init__(origin)
        self.max_pixels = max_pixels
        self.crops = crops
        self._set_lengths([len(table) for table in self.tables])

    def _load_image(self, source: int, index: int, sample: Sample) -> None:
        row = self.tables[source].rows[index]
        check_size("an image", int(row["image"][1]), transforms.largest_file(self.max_pixels))
        data = self.readers[source].read(int(row["shard"]), *map(int, row["image"]))
        sample.decode(data, self.max_pixels, self.crops)


class ImageStream(StreamWithImages):
    """Images without text, with their classes where these are asked for."""

    stream = Stream.IMAGES

    def __init__(self, origin: Origin, max_pixels: int, crops: Crops | None = None, classes: int = 0) -> None:
        """`classes`: how many classes the images' .cls members tell apart; 0: they are not read."""
        super().__init__(origin, max_pixels, crops)
        self.labels = [labels_of(table, origin.field, classes) for table in self.tables] if classes else []

    def _load_words(self, source: int, index: int, sample: Sample) -> None:
        """There are none, but there may be a class."""
        if self.labels:
            sample.label = int(self.labels[source][index])


class TextStream(SampleStream):
    stream = Stream.TEXTS

    def __init__(self, origin: Origin, tokenizer: TextTokenizer, text_length: int) -> None:
        super().__init__(origin)
        self.windows = [
            TokenWindows(table, tokenizer, text_length, origin.share.of(len(table.paths))) for table in self.tables
        ]
        lengths = [len(windows) for windows in self.windows]
        if 0 in lengths:
            raise ValueError(
                f"{origin.field}: the documents of {self.tables[lengths.index(0)].paths[0]} and its fellow "
                "shards hold not one word"
            )
        self._set_lengths(lengths)
        for windows in self.windows:
            for shard, faults in windows.faults.items():
                told = "texts: %s: %d documents are left out; the first is %s (%s)"
                log.warning(told, shard, len(faults), faults[0].key, faults[0].reason)
                self.faults.extend(faults)

    def _load_words(self, source: int, index: int, sample: Sample) -> None:
        sample.words = self.windows[source].read(index)

    def _load_image(self, source: int, index: int, sample: Sample) -> None:
        """There is none."""

    def read_ahead(self, upcoming: Iterator[int]) -> None:
        """Token files are mapped, small, and read ahead by the system."""


class PairStream(StreamWithImages):
    stream = Stream.PAIRS

    def __init__(
        self,
        origin: Origin,
        max_pixels: int,
        tokenizer: TextTokenizer,
        caption_length: int,
        caption_key: CaptionKey,
        crops: Crops | None = None,
    ) -> None:
        super().__init__(replace(origin, json_first=json_first(caption_key)), max_pixels, crops)
        self.tokenizer, self.caption_length, self.fields = tokenizer, caption_length, fields_of(caption_key)

    def _load_words(self, source: int, index: int, sample: Sample) -> None:
        captions = read_captions(self.tables[source].rows[index], self.readers[source], self.fields)
        sample.words = caption_words(captions, sample, self.tokenizer, self.caption_length)


def caption_words(captions: Captions, sample: Sample, tokenizer: TextTokenizer, length: int) -> np.ndarray:
    """Ids of one of the captions, framed and cut to the longest length."""
    caption = captions.drawn(sample.generator(Draw.CAPTION)) if len(captions.texts) > 1 else captions.first
    ids = caption_ids(caption, tokenizer)[: length - 2]
    return np.array([tokenizer.bos, *ids, tokenizer.eos], dtype=np.int64)


def caption_ids(caption: str, tokenizer: TextTokenizer) -> list[int]:
    """Ids of a caption's beginning, at least one. Raises BadSample."""
    ids = tokenizer.encode_beginning(caption)
    if not ids:
        raise BadSample("empty caption")
    return ids
