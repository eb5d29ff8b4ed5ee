"""Batches of images alone, for the image tokenizer's training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from beit3_dist.data import transforms
from beit3_dist.data.faults import Fault
from beit3_dist.data.image_memory import channels_first
from beit3_dist.data.index import Share
from beit3_dist.data.order import Stream
from beit3_dist.data.reduced import crops_of
from beit3_dist.data.streams import Draw, ImageStream, Origin
from beit3_dist.image_tokenizer.config import TokenizerDataConfig

FLIPPED = 0.5
"""Share of the images that are mirrored."""


class ImageBatch(NamedTuple):
    """One rank's b images of a step."""

    images: torch.Tensor
    """uint8 [b, 3, S, S]."""
    ids: torch.Tensor
    """int64 [b]: ids of the delivered samples."""
    faults: list[Fault]
    """Samples that had to be replaced."""

    def ids_by_kind(self) -> dict[str, list[int]]:
        return {Stream.IMAGES.field: self.ids.tolist()}


class ImageBatches(Dataset):
    """`dataset[step]` is this rank's `ImageBatch` of a step.

    `batch` is the global number of images per step; b = batch / world. Crops and mirroring, no colour jitter.
    """

    def __init__(self, data: TokenizerDataConfig, size: int, seed: int, batch: int, rank: int, world: int) -> None:
        if batch % world:
            raise ValueError(f"batch={batch} is not divisible by {world} data-parallel ranks")
        origin = Origin(data.images, "data.images", seed, data.cache, share=Share(rank, world))
        self.stream = ImageStream(origin, data.max_pixels, crops_of(data, size))
        self.size, self.batch, self.rank, self.world = size, batch, rank, world
        self.min_crop_scale = data.min_crop_scale

    def __getitem__(self, step: int) -> ImageBatch:
        count = self.batch // self.world
        first = step * self.batch + self.rank * count
        samples, views = [], []
        for position in range(first, first + count):
            sample = self.stream.read(position)
            rng, image = sample.generator(Draw.VIEW), sample.image
            views.append(transforms.cropped_view(image, rng, self.size, self.min_crop_scale, FLIPPED))
            del sample.image, image
            sample.encoded = b""
            samples.append(sample)
        return ImageBatch(
            channels_first(torch.from_numpy(np.stack(views))),
            torch.tensor([sample.id for sample in samples]),
            [fault for sample in samples for fault in sample.faults],
        )
