"""Batches of a downstream task: which examples, in which order, with which views; a pure function of their places.

Training goes through a keyed permutation in each epoch; its state is the number of samples consumed. Validation goes
through the stored order once: every rank gets as many batches as the others, and what fills the last ones up is marked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from beit3_dist.config import DataConfig, require
from beit3_dist.data.batch import Tensors
from beit3_dist.data.faults import BadSample, Fault, StreamFailed, Unreadable, check_size
from beit3_dist.data.order import generator, mix, permute
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.transforms import decode, largest_file, read_image
from beit3_dist.opening import open_regular
from beit3_dist.tasks.data.augmentation import Mixing, Views, stacked
from beit3_dist.tasks.data.examples import Example, TarMember

ATTEMPTS = 100
"""Examples that are tried for one place of training before the run stops."""


class Draw(IntEnum):
    """What random numbers of a sample are for; the order's key is apart from them."""

    ORDER = 0
    VIEW = 1
    MIXING = 2
    REPLACEMENT = 3
    MASK = 4


class Places(NamedTuple):
    """What a batch is asked for by: places in the endless order of training, or in the stored order."""

    places: tuple[int, ...]
    valid: tuple[bool, ...]
    """False: it repeats another sample, to fill the batch up."""


def training_places(consumed: int, batch: int, accumulation: int, rank: int, world: int) -> Iterator[Places]:
    """The micro-batches of one data-parallel rank after `consumed` samples, `accumulation` a step, without end.
    `batch`: global number of samples per step. Raises ValueError where it does not divide."""
    if batch % (world * accumulation):
        raise ValueError(
            f"the batch of {batch} samples does not divide into {world} data-parallel ranks x {accumulation} "
            "micro-batches"
        )
    count = batch // (world * accumulation)
    while True:
        for micro in range(accumulation):
            first = consumed + (micro * world + rank) * count
            yield Places(tuple(range(first, first + count)), (True,) * count)
        consumed += batch


def validation_places(length: int, count: int, rank: int, world: int) -> Iterator[Places]:
    """The batches of one rank that go through `length` examples once, `count` at a time. Ranks take turns of one batch,
    and each has the same number of them: where the examples end, they start again, not valid."""
    for turn in range(-(-length // (count * world))):
        first = (turn * world + rank) * count
        places = range(first, first + count)
        yield Places(tuple(place % length for place in places), tuple(place < length for place in places))


@dataclass
class TaskBatch(Tensors):
    """B samples of k images of side S and at most L words each; k and L may be 0."""

    images: torch.Tensor
    """uint8 [B, k, 3, S, S]; in the validation of segmentation [B, 1, 3, H, W]."""
    words: torch.Tensor
    """int64 [B, L]: <s>, the words, </s>, then <pad> up to the longest of the batch."""
    padding: torch.Tensor
    """bool [B, L], True at <pad>."""
    labels: torch.Tensor | Tensors
    """What the task's `labels` made, [B, ...]; float32 [B, classes] for mixed classes."""
    ids: torch.Tensor
    """int64 [B]: number of each example in the index."""
    places: torch.Tensor
    """int64 [B]: place of each sample in the order of training or of the index."""
    valid: torch.Tensor
    """bool [B]; False: the sample repeats another one and must not count."""
    faults: list[Fault]
    """Examples of training that had to be replaced."""
    targets: torch.Tensor | None = None
    """int64 [B, L]: what the task's `mask` wants recovered, -1 elsewhere; then `words` are what the model reads."""

    def ids_by_kind(self) -> dict[str, list[int]]:
        return {"examples": self.ids.tolist()}


def class_labels(examples: Sequence[Example]) -> torch.Tensor:
    """The labels of examples that have an integer, int64 [B]."""
    return torch.tensor([example.label for example in examples])


@dataclass(eq=False)
class Examples(Dataset):
    """The batches of a task's examples: `dataset[places]`. It knows no rank: places say what is whose.

    `train`: random views in keyed order; otherwise fixed views in stored order. `max_words`: longest text, <s> and </s>
    included; what is longer is cut. `labels`: makes the labels of a batch. `mixing`: mixes neighbours of training,
    whose micro-batches must then be even.
    """

    examples: Sequence[Example]
    _: KW_ONLY
    train: bool
    views: Views
    image_size: int
    max_words: int
    seed: int
    labels: Callable[[Sequence[Example]], Any] = class_labels
    mixing: Mixing | None = None
    max_pixels: int = DataConfig.max_pixels
    _last: tuple[Any, Any] = (None, None)
    """The image that was decoded last, and where it lies: of examples in a row that share it, it is decoded once."""

    def __post_init__(self) -> None:
        require(self.max_words >= 3, f"max_words={self.max_words} has no room for a word between <s> and </s>")
        if self.mixing is not None and not self.train:
            raise ValueError("mixing is for training: an evaluation measures images as they are")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, request: Places) -> TaskBatch:
        if self.mixing is not None and (len(request.places) % 2 or request.places[0] % 2):
            raise ValueError("mixing takes two neighbours at a time: the micro-batch must be even")
        faults: list[Fault] = []
        samples, views = [], []
        for place in request.places:
            example, own = self._sample(place, faults)
            samples.append(example)
            views.extend(own)
        count = len(samples)
        images = stacked(views, self.image_size)
        labels = self.labels(samples)
        if self.mixing is not None:
            keys = (generator(mix(self.seed, Draw.MIXING, place)) for place in request.places[::2])
            images, labels = self.mixing(images, labels, list(keys))
        words, padding = padded_words([example.words for example in samples], self.max_words)
        return TaskBatch(
            images=images.view(count, len(views) // count, *images.shape[1:]),
            words=words,
            padding=padding,
            labels=labels,
            ids=torch.tensor([example.id for example in samples]),
            places=torch.tensor(request.places),
            valid=torch.tensor(request.valid),
            faults=faults,
        )

    def _sample(self, place: int, faults: list[Fault]) -> tuple[Example, list[np.ndarray]]:
        """The example of a place, and its views. In training an example that cannot be read, or whose image cannot be
        decoded, is added to `faults`, and a keyed probe of the same epoch takes its place. Raises StreamFailed after
        100 bad ones in a row, and for the first one in evaluation, where nothing can take its place."""
        if not self.train:
            found = self._read(place)
            if isinstance(found, Fault):
                raise StreamFailed(f"example {found.key} cannot be evaluated: {found.reason}", [found])
            example, images = found
            return self.views.of_evaluation(example, images, self.image_size)
        length = len(self.examples)
        epoch, first = divmod(place, length)
        index = permute(first, length, mix(self.seed, Draw.ORDER, epoch))
        for attempt in range(1, ATTEMPTS + 1):
            found = self._read(index)
            if isinstance(found, Fault):
                faults.append(found)
                index = mix(self.seed, Draw.REPLACEMENT, place, attempt) % length
                continue
            example, images = found
            keys = (generator(mix(self.seed, Draw.VIEW, epoch, index, number)) for number in range(len(images)))
            try:
                return self.views.of_training(example, images, self.image_size, keys)
            except BadSample as bad:  # its label is of another image
                faults.append(Fault("examples", str(example.images[0]), example.name, str(bad)))
                index = mix(self.seed, Draw.REPLACEMENT, place, attempt) % length
        last = faults[-1]
        raise StreamFailed(f"{ATTEMPTS} examples in a row cannot be used; the last: {last.key}: {last.reason}", faults)

    def _read(self, index: int) -> tuple[Example, list[Image.Image]] | Fault:
        """An example and its images in RGB, or what is wrong with it."""
        shard, key, image = "", f"number {index}", None
        try:
            example = self.examples[index]
            shard, key = str(next(iter(example.images), "")), example.name
            images = []
            for image in example.images:
                if image != self._last[0]:
                    self._last = image, decoded(image, self.max_pixels)
                images.append(self._last[1])
            return example, images
        except OSError as error:  # what the decoder raises has no number
            bad = BadSample(str(error)) if error.errno is None else Unreadable(error.strerror)
        except BadSample as unusable:
            bad = unusable
        return Fault.of(type(bad)(f"{image}: {bad}" if image else str(bad)), "examples", shard, key)


def padded_words(texts: Sequence[Sequence[int] | None], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of texts, framed by <s> and </s> and cut to `longest` with them: words int64 and padding bool, [B, L];
    [B, 0] where all are None."""
    lengths = [0 if text is None else min(len(text) + 2, longest) for text in texts]
    words = np.full((len(texts), max(lengths)), TextTokenizer.pad, dtype=np.int64)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        if text is not None:
            words[row, :length] = TextTokenizer.bos, *text[: length - 2], TextTokenizer.eos
    padding = np.arange(words.shape[1]) >= np.array(lengths)[:, None]
    return torch.from_numpy(words), torch.from_numpy(padding)


def decoded(image: Path | TarMember, max_pixels: int) -> Image.Image:
    """The image in a file or a tar's member. Raises OSError or BadSample."""
    if isinstance(image, Path):
        return read_image(image, max_pixels)
    check_size("an image", image.size, largest_file(max_pixels))
    with open_regular(image.tar) as file:
        data = os.pread(file.fileno(), image.size, image.offset)
    if len(data) < image.size:
        raise BadSample(f"short read: {len(data)} of {image.size} bytes")
    return decode(data, max_pixels)
