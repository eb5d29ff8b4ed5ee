"""The mixed batch: images, texts and pairs of one micro-batch, augmented, masked and padded.

A batch is a pure function of its request (samples consumed per stream, number of the micro-batch) and the rank, so
loader processes hold no state: resuming is asking for the next request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from beit3_dist.config import BatchConfig, RunConfig
from beit3_dist.data import transforms
from beit3_dist.data.faults import Fault
from beit3_dist.data.index import Share
from beit3_dist.data.order import Blocks, Numbers, Stream, mix_arrays
from beit3_dist.data.pictures import Pictures, channels_first
from beit3_dist.data.streaming import SequentialStream, sequential
from beit3_dist.data.streams import Draw, ImageStream, PairStream, Sample, SampleStream, TextStream
from beit3_dist.data.text import TextTokenizer
from beit3_dist.objectives.masking import block_masks, mask_count, mask_words


class Request(NamedTuple):
    """What a micro-batch is asked for by."""

    consumed: tuple[int, int, int]
    """Images, texts and pairs that all ranks consumed before this step."""
    micro: int
    """Number of the micro-batch in the step."""
    part: int = 0
    """Part of the micro-batch, where loader processes share it because they own the readers of a sequential stream."""
    parts: int = 1
    """Number of the parts."""


@dataclass
class Tensors:
    """A batch whose fields are tensors and other things."""

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, torch.Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """The same batch with its tensors on the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)


@dataclass
class MicroBatch(Tensors):
    """One rank's micro-batch of I images, P pairs and T texts; S is the picture's side, L the longest text."""

    images: torch.Tensor
    """uint8 [I + P, 3, S, S]: image-only samples first, then pairs; before the jitter, as are `tokenizer_images`."""
    tokenizer_images: torch.Tensor | None
    """uint8 [I + P, 3, S2, S2]: the image tokenizer's views; None: the same pictures as `images`."""
    image_mask: torch.Tensor
    """bool [I + P, patches], True = masked."""
    captions: torch.Tensor
    """int64 [P, L] after masking, padded with <pad>."""
    caption_targets: torch.Tensor
    """int64 [P, L] before masking."""
    caption_mask: torch.Tensor
    """bool [P, L], True = to be predicted."""
    caption_lengths: torch.Tensor
    """int64 [P], <s> and </s> included."""
    texts: torch.Tensor
    """int64 [T, L] after masking, padded with <pad>."""
    text_targets: torch.Tensor
    """int64 [T, L] before masking."""
    text_mask: torch.Tensor
    """bool [T, L], True = to be predicted."""
    text_lengths: torch.Tensor
    """int64 [T], <s> and </s> included."""
    sample_ids: torch.Tensor
    """int64 [I + P + T]: ids of the delivered samples; images, then pairs, then texts."""
    positions: torch.Tensor
    """int64 [I + P + T]: place of each sample in its stream's global batch of this step."""
    streams: torch.Tensor
    """int64 [I + P + T]: number of each sample's stream."""
    faults: list[Fault]
    """Samples that had to be replaced."""
    jitter: torch.Tensor | None = None
    """float32 [I + P, 3]: `transforms.jitter_weights` of each picture, for both its views; None: no jitter."""
    readers: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 6, dtype=torch.int64))
    """int64 [R, 6]: `streaming.Row` of each virtual reader that is read in this process, after this micro-batch."""

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.captions)

    @property
    def num_images(self) -> int:
        """I."""
        return len(self.images) - len(self.captions)

    @property
    def num_texts(self) -> int:
        """T."""
        return len(self.texts)

    def ids_by_kind(self) -> dict[str, list[int]]:
        """Ids of the samples by the name of their stream."""
        return {stream.name.lower(): self.sample_ids[self.streams == stream].tolist() for stream in Stream}

    def __getstate__(self) -> dict[str, Any]:
        """Pictures stay tensors, which loader processes pass on in shared memory; the rest goes by value, as arrays: a
        file in shared memory for each of the small tensors would take longer than making them."""
        return {
            name: value.numpy() if isinstance(value, torch.Tensor) and value.dtype is not torch.uint8 else value
            for name, value in self.__dict__.items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


class MixedBatches(Dataset):
    """The micro-batches of one data-parallel rank: `dataset[request]`."""

    def __init__(
        self, config: RunConfig, tokenizer_image_size: int, rank: int, world: int, held_out: bool = False
    ) -> None:
        """Opens the streams, building their indexes and token files where the cache has none.

        `tokenizer_image_size` is the side of the image tokenizer's view. `held_out`: the shards of `config.eval` in
        stored order, with the same crops and masks every time. Raises ValueError with one line that names the
        field where the data, the tokenizer or the batch sizes do not fit.
        """
        self.config = config
        self.rank = rank
        self.world = world
        self.held_out = held_out
        self.tokenizer_image_size = tokenizer_image_size
        self.micro_batch = config.micro_batch(world)
        self.tokenizer = TextTokenizer(config.text_tokenizer)
        self.tokenizer.check_vocab(config.model.vocab_size)
        data, seed, shuffled, share = config.data, config.seed, not held_out, Share(rank, world)
        shards, prefix = (config.eval, "eval") if held_out else (data, "data")
        blocks = Blocks(data.shuffle_block, data.shuffle_window) if data.shuffle == "blocks" else None
        self.images = self._sequential(Stream.IMAGES) or ImageStream(
            shards.images, f"{prefix}.images", seed, data.cache, data.max_pixels, shuffled, blocks, share
        )
        self.texts = self._sequential(Stream.TEXTS) or TextStream(
            shards.texts,
            f"{prefix}.texts",
            seed,
            data.cache,
            self.tokenizer,
            data.text_length,
            shuffled,
            blocks,
            share,
        )
        self.pairs = self._sequential(Stream.PAIRS) or PairStream(
            shards.pairs,
            f"{prefix}.pairs",
            seed,
            data.cache,
            data.max_pixels,
            self.tokenizer,
            data.caption_length,
            data.caption_key,
            shuffled,
            blocks,
            share,
        )

    def _sequential(self, stream: Stream) -> SequentialStream | None:
        """A training stream of shards that are no files."""
        name, config = stream.name.lower(), self.config
        shards = getattr(config.data, name)
        if self.held_out or not sequential(shards, f"data.{name}"):
            return None
        batch = getattr(config.batch, name)
        return SequentialStream(stream, shards, config.data, config.seed, self.tokenizer, batch, self.rank, self.world)

    @property
    def sequential(self) -> list[SequentialStream]:
        """The streams without random access."""
        return [s for s in (self.images, self.texts, self.pairs) if isinstance(s, SequentialStream)]

    def indexed(self, stream: Stream) -> SampleStream:
        """A stream with random access; ValueError if it has none."""
        found = (self.images, self.texts, self.pairs)[stream]
        if isinstance(found, SequentialStream):
            raise ValueError(f"data.{stream.name.lower()} has no random access, which is needed here: name files")
        return found

    def restore(self, readers: list[list[int]], started: bool) -> None:
        """Goes on from the rows of the virtual readers of a run that has `started`; else from the beginning."""
        for stream in self.sequential:
            stream.restore(readers, started)

    def lengths(self) -> tuple[int, int, int]:
        """Images, texts (windows) and pairs of one epoch of each."""
        images, texts, pairs = (len(self.indexed(stream)) for stream in Stream)
        return images, texts, pairs

    def faults(self) -> list[Fault]:
        """What the indexes left out: damage of whole shards, documents that cannot be read."""
        return self.images.faults + self.texts.faults + self.pairs.faults

    def __getitem__(self, request: Request) -> MicroBatch:
        places = [self._places(stream, request) for stream in (self.images, self.pairs, self.texts)]
        pictures = Pictures(len(places[0]) + len(places[1]), self.config, self.tokenizer_image_size)
        images = self._read(self.images, request, places[0], pictures)
        pairs = self._read(self.pairs, request, places[1], pictures)
        texts = self._read(self.texts, request, places[2], None)
        samples = images + pairs + texts
        ratios = self.config.objective
        picture_masked, caption_masked = self._masked_sides(pairs)
        captions, caption_targets, caption_mask, caption_lengths = self._words(
            pairs, ratios.caption_mask_ratio, caption_masked
        )
        words, text_targets, text_mask, text_lengths = self._words(texts, ratios.text_mask_ratio, [True] * len(texts))
        return MicroBatch(
            images=channels_first(pictures.model),
            tokenizer_images=None if pictures.tokenizer is None else channels_first(pictures.tokenizer),
            jitter=self._jitter(images + pairs) if self.config.data.color_jitter else None,
            image_mask=self._image_masks(images + pairs, [True] * len(images) + picture_masked),
            captions=captions,
            caption_targets=caption_targets,
            caption_mask=caption_mask,
            caption_lengths=caption_lengths,
            texts=words,
            text_targets=text_targets,
            text_mask=text_mask,
            text_lengths=text_lengths,
            sample_ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
            positions=torch.tensor(sum(places, []), dtype=torch.int64),
            streams=torch.tensor([int(sample.stream) for sample in samples], dtype=torch.int64),
            faults=[fault for sample in samples for fault in sample.faults],
            readers=torch.tensor([row for stream in self.sequential for row in stream.positions()]).long().view(-1, 6),
        )

    def _places(self, stream: SampleStream | SequentialStream, request: Request) -> list[int]:
        """Places in the step's global batch of this rank's samples of a stream."""
        count = self.micro_batch[stream.stream]
        if isinstance(stream, SequentialStream):
            return stream.places(request.micro * count, count, request.part, request.parts)
        first = (request.micro * self.world + self.rank) * count
        return list(range(first + request.part, first + count, request.parts))

    def _read(
        self, stream: SampleStream | SequentialStream, request: Request, places: list[int], pictures: Pictures | None
    ) -> list[Sample]:
        """The samples at these places; their views go to `pictures`.

        Each picture is cropped and dropped before the next one is decoded: memory that is used again is in the cache,
        while thirty pictures at a time would each be written to fresh pages.
        """
        samples = []
        if places and isinstance(stream, SampleStream):
            stream.read_ahead(self._upcoming(stream, request))
        for sample in self._samples(stream, [request.consumed[stream.stream] + place for place in places]):
            samples.append(sample)
            if pictures is not None:
                pictures.add(sample.picture, sample.generator(Draw.VIEW))
                del sample.picture
        return samples

    def _upcoming(self, stream: SampleStream, request: Request) -> Iterator[int]:
        """The positions of a stream that this process reads from this request on, without end. Loader processes take
        requests in turn, or parts of each."""
        worker, batches = get_worker_info(), self.config.batch
        stride = 1 if worker is None or request.parts > 1 else worker.num_workers
        for micro in count(request.micro, stride):
            step, number = divmod(micro, batches.accumulation)
            begin = request.consumed[stream.stream] + step * getattr(batches, stream.stream.name.lower())
            yield from (begin + place for place in self._places(stream, request._replace(micro=number)))

    def _samples(self, stream: SampleStream | SequentialStream, positions: list[int]) -> Iterator[Sample]:
        """The samples at these positions of a stream."""
        return stream.read_all(positions)

    def _masked_sides(self, pairs: list[Sample]) -> tuple[list[bool], list[bool]]:
        """Whether the picture, and whether the caption, of each pair is masked."""
        if self.config.objective.mask_pairs == "both":
            return [True] * len(pairs), [True] * len(pairs)
        coins = (_numbers(pairs, Draw.MASKED_SIDE)(0, 1)[:, 0] < 0.5).tolist()
        return coins, [not coin for coin in coins]

    def _jitter(self, samples: list[Sample]) -> torch.Tensor:
        """float32 [samples, 3]."""
        numbers = _numbers(samples, Draw.JITTER)(0, 4)
        return torch.from_numpy(
            transforms.jitter_weights(*transforms.draw_jitter(self.config.data.color_jitter, numbers))
        )

    def _image_masks(self, samples: list[Sample], masked: list[bool]) -> torch.Tensor:
        """bool [samples, patches]."""
        model = self.config.model
        grid = model.image_size // model.patch_size
        count = mask_count(self.config.objective.image_mask_ratio, model.patches)
        counts = np.where(np.array(masked, dtype=bool), count, 0)
        return torch.from_numpy(block_masks(grid, counts, _numbers(samples, Draw.IMAGE_MASK)))

    def _words(self, samples: list[Sample], ratio: float, masked: list[bool]) -> tuple[torch.Tensor, ...]:
        """Inputs, targets, words to predict and lengths of the samples' words, padded to the longest."""
        objective, tokenizer = self.config.objective, self.tokenizer
        lengths = [len(sample.words) for sample in samples]
        targets = np.full((len(samples), max(lengths, default=0)), tokenizer.pad, dtype=np.int64)
        for row, sample in zip(targets, samples, strict=True):
            row[: len(sample.words)] = sample.words
        inputs, predict = mask_words(
            targets,
            _numbers(samples, Draw.WORD_MASK),
            ratio=ratio,
            specials=tokenizer.specials,
            mask_id=tokenizer.mask,
            words=tokenizer.words,
            mask_token_share=objective.mask_token_share,
            random_token_share=objective.random_token_share,
        )
        shown = ~np.array(masked, dtype=bool)
        inputs[shown], predict[shown] = targets[shown], False
        sizes = torch.tensor(lengths, dtype=torch.int64)
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(predict), sizes


def _numbers(samples: list[Sample], use: Draw) -> Numbers:
    """The samples' random numbers for one use."""
    return Numbers((sample.key for sample in samples), use)


def requests_from(consumed: tuple[int, int, int], batch: BatchConfig) -> Iterator[Request]:
    """All requests of a run that goes on after `consumed` images, texts and pairs, without end."""
    images, texts, pairs = consumed
    while True:
        for micro in range(batch.accumulation):
            yield Request((images, texts, pairs), micro)
        images, texts, pairs = images + batch.images, texts + batch.texts, pairs + batch.pairs


def hash_terms(batch: MicroBatch) -> int:
    """Sum over the samples of hash(stream, place in the step, id), modulo 2^64, as a signed integer.

    Sums over the micro-batches and ranks of a step give the step's sample_hash, in any layout.
    """
    terms = mix_arrays(*(part.cpu().numpy() for part in (batch.streams, batch.positions, batch.sample_ids)))
    return int(terms.sum(dtype=np.uint64).astype(np.int64))
