"""Memory for the images of a micro-batch, in a loader process shared with the trainer."""

from __future__ import annotations

import ctypes
from typing import overload

import numpy as np
import torch
from torch.utils.data import get_worker_info

from beit3_dist.config import RunConfig
from beit3_dist.data import transforms
from beit3_dist.data.reduced import Decoded

LIBC = ctypes.CDLL(None)
MADV_POPULATE_WRITE = 23
"""Number of the advice in Linux's asm-generic/mman-common.h."""


class ImageMemory:
    """Room for the views of a micro-batch's images, filled one after the other."""

    def __init__(self, count: int, config: RunConfig, tokenizer_size: int) -> None:
        size = config.model.image_size
        self.model = pixels(count, size)
        """uint8 [count, S, S, 3]."""
        self.tokenizer = None if tokenizer_size == size else pixels(count, tokenizer_size)
        """uint8 [count, S2, S2, 3]; None: the tokenizer sees the same."""
        self.rooms = self.model.numpy(), None if self.tokenizer is None else self.tokenizer.numpy()
        self.filled = 0
        self.config = config.data

    def add(self, image: Decoded, rng: np.random.Generator) -> None:
        model, tokenizer = self.rooms
        own, other = model[self.filled], None if tokenizer is None else tokenizer[self.filled]
        transforms.two_views(image, rng, own, other, self.config)
        self.filled += 1


def pixels(count: int, size: int) -> torch.Tensor:
    """Room for `count` images, uint8 [count, size, size, 3]; in a loader process in the memory that it shares with
    the trainer, so that they need not be copied there."""
    if get_worker_info() is None:
        return torch.empty(count, size, size, 3, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(count * size * size * 3)  # what torch's own collation does
    # All pages at once, in half the time of touching them one by one; a kernel before 5.14 knows no such advice.
    LIBC.madvise(ctypes.c_void_p(shared.data_ptr()), ctypes.c_size_t(shared.nbytes()), MADV_POPULATE_WRITE)
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(count, size, size, 3)


@overload
def channels_first(images: torch.Tensor) -> torch.Tensor: ...
@overload
def channels_first(images: torch.Tensor | None) -> torch.Tensor | None: ...
def channels_first(images: torch.Tensor | None) -> torch.Tensor | None:
    """uint8 [N, S, S, 3] -> uint8 [N, 3, S, S] that lies in memory as it did: the device reorders it."""
    return None if images is None else images.permute(0, 3, 1, 2)
