"""The mixed batch: images, texts and pairs of one micro-batch, augmented, masked and padded.

A batch is a pure function of its request (samples consumed per stream, number of the micro-batch) and the rank, so
loader processes hold no state: resuming is asking for the next request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from beit3_dist.config import BatchConfig, RunConfig, sources_of
from beit3_dist.data import transforms
from beit3_dist.data.annotations import Annotator
from beit3_dist.data.faults import Fault
from beit3_dist.data.image_memory import ImageMemory, channels_first
from beit3_dist.data.index import ALONE, Share
from beit3_dist.data.order import Blocks, Numbers, Stream, hash_sum
from beit3_dist.data.reduced import crops_of
from beit3_dist.data.streaming import SequentialStream, sequential
from beit3_dist.data.streams import Draw, ImageStream, Origin, PairStream, Sample, SampleStream, TextStream
from beit3_dist.data.text import TextTokenizer
from beit3_dist.hashing import hash_bytes


class Request(NamedTuple):
    """What a micro-batch is asked for by."""

    consumed: tuple[int, int, int]
    """Images, texts and pairs that all ranks consumed before this step."""
    micro: int
    """Number of the micro-batch in the step."""
    part: int = 0
    """Part of the micro-batch, where loader processes share it because they own the readers of a sequential stream."""
    parts: int = 1


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same structure of batches and dicts with `change` of every `kind` in it."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(item, kind, change) for name, item in value.items()}
    if isinstance(value, Tensors):
        return replace(
            value, **{field.name: mapped(getattr(value, field.name), kind, change) for field in fields(value)}
        )
    return value


@dataclass(eq=False)
class Tensors:
    """A batch whose fields are tensors, dicts and batches of tensors, and other things."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        return mapped(self, torch.Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return mapped(self, torch.Tensor, torch.Tensor.pin_memory)


@dataclass
class Samples(Tensors):
    """The n samples of one stream in a rank's micro-batch; S is the images' side, L the longest text."""

    ids: torch.Tensor
    """int64 [n]: ids of the delivered samples."""
    positions: torch.Tensor
    """int64 [n]: place of each sample in the stream's global batch of this step."""
    images: torch.Tensor | None = None
    """uint8 [n, 3, S, S], before the jitter, as are `tokenizer_images`; None: the stream has no images."""
    tokenizer_images: torch.Tensor | None = None
    """uint8 [n, 3, S2, S2]: the image tokenizer's views; None: the same as `images`."""
    jitter: torch.Tensor | None = None
    """float32 [n, 3]: `transforms.jitter_weights` of each image, for both its views; None: no jitter."""
    text: torch.Tensor | None = None
    """int64 [n, L] as it is, padded with <pad>; None: the stream has no text."""
    lengths: torch.Tensor | None = None
    """int64 [n]: tokens of each text, <s> and </s> included."""
    sets: torch.Tensor | None = None
    """int64 [n]: number of each sample's data set among the stream's names, or -1; None: the stream names none."""
    annotations: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Objective -> field -> [n, ...]: what it has drawn; see `Annotator`."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class MicroBatch(Tensors):
    """One rank's micro-batch; what else is known of it is kept by the object that it is."""

    streams: dict[str, Samples]
    """The run's streams by name: images, pairs, texts, in this order."""
    faults: list[Fault] = field(default_factory=list)
    """Samples that had to be replaced."""
    readers: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 6, dtype=torch.int64))
    """int64 [R, 6]: `streaming.Row` of each virtual reader that is read in this process, after this micro-batch."""

    @property
    def with_images(self) -> list[Samples]:
        return [samples for samples in self.streams.values() if samples.images is not None]

    def ids_by_kind(self) -> dict[str, list[int]]:
        return {name: samples.ids.tolist() for name, samples in self.streams.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Images stay tensors, which loader processes pass on in shared memory; the rest goes by value, as arrays: a
        file in shared memory for each of the small tensors would take longer than making them."""
        by_value = mapped(self, torch.Tensor, lambda t: t if t.dtype is torch.uint8 else t.numpy())
        return by_value.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, mapped(value, np.ndarray, torch.from_numpy))


class MixedBatches(Dataset):
    """The micro-batches of one data-parallel rank: `dataset[request]`."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer_image_size: int,
        rank: int,
        world: int,
        held_out: bool = False,
        annotators: Sequence[Annotator] = (),
        share: Share = ALONE,
    ) -> None:
        """Opens the streams, building their indexes and token files where the cache has none. `held_out`: the shards of
        `config.eval` in stored order, with the same crops and masks every time. `share`: of the work on shards that are
        new. Raises ValueError with one line that
        names the field where the data, the tokenizer or the batch sizes do not fit."""
        self.config = config
        self.rank = rank
        self.world = world
        self.held_out = held_out
        self.tokenizer_image_size = tokenizer_image_size
        self.crops = crops_of(config.data, max(config.model.image_size, tokenizer_image_size))
        self.annotators = annotators
        self.share = share
        self.micro_batch = config.micro_batch(world)
        self.tokenizer = TextTokenizer(config.text_tokenizer)
        self.tokenizer.check_vocab(config.model.vocab_size)
        self.streams = {stream: self._open(stream) for stream in Stream if getattr(config.batch, stream.field)}
        self.sets = {stream: self._sets(stream) for stream in self.streams}
        """For each source of a stream the number of its name among all of the stream; empty where there are none."""

    def _open(self, stream: Stream) -> SampleStream | SequentialStream:
        config, data, seed = self.config, self.config.data, self.config.seed
        shards, prefix = (config.eval, "eval") if self.held_out else (data, "data")
        patterns, field = getattr(shards, stream.field), f"{prefix}.{stream.field}"
        classes = max((annotator.label_classes for annotator in self.annotators), default=0)
        if not self.held_out and sequential(patterns, field):  # shards that are no files
            if classes and stream is Stream.IMAGES:
                raise ValueError(f"{field} has no random access, which the classes of images need: name files")
            batch = getattr(config.batch, stream.field)
            place = batch, self.rank, self.world, self.crops
            return SequentialStream(stream, patterns, data, seed, self.tokenizer, *place)
        blocks = Blocks(data.shuffle_block, data.shuffle_window) if data.shuffle == "blocks" else None
        temperature = getattr(data.temperature, stream.field)
        origin = Origin(
            patterns, field, seed, data.cache, not self.held_out, blocks, self.share, temperature=temperature
        )
        match stream:
            case Stream.IMAGES:
                return ImageStream(origin, data.max_pixels, self.crops, classes)
            case Stream.TEXTS:
                return TextStream(origin, self.tokenizer, data.text_length)
        words = self.tokenizer, data.caption_length, data.caption_key
        return PairStream(origin, data.max_pixels, *words, self.crops)

    def _sets(self, stream: Stream) -> list[int]:
        names = self.config.sets(stream.field)
        shards = getattr(self.config.eval if self.held_out else self.config.data, stream.field)
        sources = sources_of(shards, stream.field) if names else []
        return [names.index(source.name) if source.name else -1 for source in sources]

    def samples_of_sets(self, consumed: dict[str, int], batch: BatchConfig) -> dict[str, int]:
        """STREAM.NAME -> samples of each named data set in the step that comes after so many samples of each stream."""
        counts: dict[str, int] = {}
        for stream, numbers in self.sets.items():
            names = self.config.sets(stream.field)
            if names and max(numbers) >= 0:
                shares = self.streams[stream].shared(consumed[stream.field], getattr(batch, stream.field))
                counts |= {f"{stream.field}.{names[n]}": share for n, share in zip(numbers, shares, strict=True)}
        return counts

    @property
    def sequential(self) -> list[SequentialStream]:
        """The streams without random access."""
        return [stream for stream in self.streams.values() if isinstance(stream, SequentialStream)]

    def indexed(self, stream: Stream) -> SampleStream:
        """A stream with random access; ValueError if it has none."""
        found = self.streams[stream]
        if isinstance(found, SequentialStream):
            raise ValueError(f"data.{stream.field} has no random access, which is needed here: name files")
        return found

    def restore(self, readers: list[list[int]], started: bool) -> None:
        """Goes on from the rows of the virtual readers of a run that has `started`; else from the beginning."""
        for stream in self.sequential:
            stream.restore(readers, started)

    def lengths(self) -> tuple[int, int, int]:
        """Images, texts (windows) and pairs of one epoch of each; 0 of a stream that the run does not have."""
        images, texts, pairs = (len(self.indexed(stream)) if stream in self.streams else 0 for stream in Stream)
        return images, texts, pairs

    def faults(self) -> list[Fault]:
        """What the indexes left out: damage of whole shards, documents that cannot be read."""
        return [fault for stream in self.streams.values() for fault in stream.faults]

    def __getitem__(self, request: Request) -> MicroBatch:
        order = [stream for stream in (Stream.IMAGES, Stream.PAIRS, Stream.TEXTS) if stream in self.streams]
        faults: list[Fault] = []
        streams = {stream.field: self._samples_of(self.streams[stream], request, faults) for stream in order}
        readers = torch.tensor([row for stream in self.sequential for row in stream.positions()])
        return MicroBatch(streams, faults, readers.long().view(-1, 6))

    def _samples_of(self, stream: SampleStream | SequentialStream, request: Request, faults: list[Fault]) -> Samples:
        """This rank's samples of a stream; `faults` takes what they replace."""
        places, kind = self._places(stream, request), stream.stream
        memory = ImageMemory(len(places), self.config, self.tokenizer_image_size) if kind.has_images else None
        samples = self._read(stream, request, places, memory)
        faults += [fault for sample in samples for fault in sample.faults]
        text = self._text(samples) if kind.has_text else None
        sets = self.sets[kind]
        return Samples(
            ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
            positions=torch.tensor(places, dtype=torch.int64),
            images=None if memory is None else channels_first(memory.model),
            tokenizer_images=None if memory is None else channels_first(memory.tokenizer),
            jitter=self._jitter(samples) if kind.has_images and self.config.data.color_jitter else None,
            text=None if text is None else torch.from_numpy(text),
            lengths=None if text is None else torch.tensor([len(s.words) for s in samples], dtype=torch.int64),
            sets=torch.tensor([sets[s.source] for s in samples], dtype=torch.int64) if sets else None,
            annotations={a.name: a.annotate(kind, samples, text, self.tokenizer) for a in self.annotators},
        )

    def _places(self, stream: SampleStream | SequentialStream, request: Request) -> list[int]:
        """Places in the step's global batch of this rank's samples of a stream."""
        count = self.micro_batch[stream.stream]
        if isinstance(stream, SequentialStream):
            return stream.places(request.micro * count, count, request.part, request.parts)
        first = (request.micro * self.world + self.rank) * count
        return list(range(first + request.part, first + count, request.parts))

    def _read(
        self, stream: SampleStream | SequentialStream, request: Request, places: list[int], memory: ImageMemory | None
    ) -> list[Sample]:
        """The samples at these places; their views go to `memory`. Each image is cropped and dropped before the next
        one is decoded: memory that is used again is in the cache, while thirty images at a time would each be written
        to fresh pages."""
        samples = []
        if places and isinstance(stream, SampleStream):
            stream.read_ahead(self._upcoming(stream, request))
        for sample in self._samples(stream, [request.consumed[stream.stream] + place for place in places]):
            samples.append(sample)
            if memory is not None:
                memory.add(sample.image, sample.generator(Draw.VIEW))
                if any(annotator.hashes_images for annotator in self.annotators):
                    sample.image_hash = hash_bytes(sample.encoded)
                del sample.image
                sample.encoded = b""
        return samples

    def _upcoming(self, stream: SampleStream, request: Request) -> Iterator[int]:
        """The positions of a stream that this process reads from this request on, without end. Loader processes take
        requests in turn, or parts of each."""
        worker, batches = get_worker_info(), self.config.batch
        stride = 1 if worker is None or request.parts > 1 else worker.num_workers
        for micro in count(request.micro, stride):
            step, number = divmod(micro, batches.accumulation)
            begin = request.consumed[stream.stream] + step * getattr(batches, stream.stream.field)
            yield from (begin + place for place in self._places(stream, request._replace(micro=number)))

    def _samples(self, stream: SampleStream | SequentialStream, positions: list[int]) -> Iterator[Sample]:
        return stream.read_all(positions)

    def _jitter(self, samples: list[Sample]) -> torch.Tensor:
        """float32 [samples, 3]."""
        numbers = Numbers((sample.key for sample in samples), Draw.JITTER)(0, 4)
        return torch.from_numpy(
            transforms.jitter_weights(*transforms.draw_jitter(self.config.data.color_jitter, numbers))
        )

    def _text(self, samples: list[Sample]) -> np.ndarray:
        """int64 [samples, longest], padded."""
        longest = max((len(sample.words) for sample in samples), default=0)
        text = np.full((len(samples), longest), self.tokenizer.pad, dtype=np.int64)
        for row, sample in zip(text, samples, strict=True):
            row[: len(sample.words)] = sample.words
        return text


def requests_from(consumed: tuple[int, int, int], batch: BatchConfig) -> Iterator[Request]:
    """All requests of a run that goes on after `consumed` images, texts and pairs, without end."""
    images, texts, pairs = consumed
    while True:
        for micro in range(batch.accumulation):
            yield Request((images, texts, pairs), micro)
        images, texts, pairs = images + batch.images, texts + batch.texts, pairs + batch.pairs


def hash_terms(batch: MicroBatch) -> int:
    """Sum over the samples of hash(stream, place in the step, id), modulo 2^64, as a signed integer. Sums over the
    micro-batches and ranks of a step give the step's sample_hash, in any layout."""
    columns = (
        (np.full(len(samples), int(Stream[name.upper()])), samples.positions.cpu().numpy(), samples.ids.cpu().numpy())
        for name, samples in batch.streams.items()
    )
    return hash_sum(*map(np.concatenate, zip(*columns, strict=True)))
