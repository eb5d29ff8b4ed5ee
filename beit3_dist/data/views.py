"""Images of a micro-batch on the device, where jitter is applied: to the model's and the image tokenizer's views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from beit3_dist.data.batch import MicroBatch
from beit3_dist.model.token_layout import to_device

Tokenize = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, S, S] on the device -> visual codes int64 [B, patches]."""
Codes = Tokenize | Tensor
"""What makes visual codes, or those of a micro-batch's images, int64 [I, patches]."""
GREY = (0.299, 0.587, 0.114)
"""Weights of the channels in a colour's grey (ITU-R 601-2, as in Pillow)."""


def jittered(images: Tensor, weights: Tensor) -> Tensor:
    """Images uint8 [B, 3, S, S] after the changes of colour that `transforms.jitter_weights` [B, 3] stand for. Levels
    are rounded and clipped once, at the end."""
    colour = images.to(torch.float32, memory_format=torch.contiguous_format)
    red, green, blue = (share * colour[:, channel] for channel, share in enumerate(GREY))
    grey = red + green + blue
    own, mixed, mean = weights[:, :, None, None].unbind(1)  # each [B, 1, 1]
    shift = mixed * grey + mean * grey.mean((1, 2), keepdim=True)
    return torch.addcmul(shift[:, None], colour, own[:, None]).round_().clamp_(0, 255).to(torch.uint8)


class SeenImages:
    """The images of a micro-batch on the device, those of all its streams in one tensor: I images, stream by stream.
    What nobody asks for is not made."""

    def __init__(self, batch: MicroBatch, device: torch.device, codes: Codes | None = None) -> None:
        self._streams = {name: samples for name, samples in batch.streams.items() if samples.images is not None}
        self._device, self._codes = device, codes

    @cached_property
    def model(self) -> Tensor:
        """What the model sees, uint8 [I, 3, S, S]."""
        return self._seen([samples.images for samples in self._streams.values()])

    @cached_property
    def tokenizer(self) -> Tensor:
        """What the image tokenizer sees, uint8 [I, 3, S2, S2]."""
        others = [samples.tokenizer_images for samples in self._streams.values()]
        return self.model if others[0] is None else self._seen(others)

    @cached_property
    def images(self) -> dict[str, Tensor]:
        """What the model sees of each stream, uint8 [n, 3, S, S]."""
        return self.by_stream(self.model)

    def codes(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Visual codes of those images of each stream that are wanted, bool [n] on the host: int64 [m, patches]."""
        none = {name: torch.zeros(len(samples), dtype=torch.bool) for name, samples in self._streams.items()}
        chosen = none | dict(wanted)
        some = torch.cat([*chosen.values()])
        of_streams = [int(part.sum()) for part in chosen.values()]
        return dict(zip(chosen, self._codes_of(some).split(of_streams), strict=True))

    def _codes_of(self, wanted: Tensor) -> Tensor:
        """Of the images that are wanted, bool [I]."""
        assert self._codes is not None
        if isinstance(self._codes, Tensor):
            return to_device(self._codes[wanted.to(self._codes.device)], self._device)
        if not wanted.any():
            return torch.zeros(0, 1, dtype=torch.int64, device=self._device)
        rows = to_device(wanted.nonzero().squeeze(1), self._device)
        return self._codes(self.tokenizer if wanted.all() else self.tokenizer.index_select(0, rows))

    def by_stream(self, of_all: Tensor) -> dict[str, Tensor]:
        """What belongs to each stream's images, of [I, ...]."""
        return dict(zip(self._streams, of_all.split([len(s) for s in self._streams.values()]), strict=True))

    def _seen(self, images: list[Tensor | None]) -> Tensor:
        weights = [samples.jitter for samples in self._streams.values()]
        seen = self._moved(images)
        return seen if weights[0] is None else jittered(seen, self._moved(weights))

    def _moved(self, parts: list[Tensor | None]) -> Tensor:
        moved = [to_device(part, self._device) for part in parts if part is not None]
        return moved[0] if len(moved) == 1 else torch.cat(moved)
