"""Images of a micro-batch on the device, where jitter is applied: to the model's and the image tokenizer's views."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beit3_dist.data.batch import MicroBatch
from beit3_dist.model.layout import to_device

Tokenize = Callable[[Tensor], Tensor]
"""uint8 pictures [B, 3, S, S] on the device -> visual codes int64 [B, patches]."""


GREY = (0.299, 0.587, 0.114)
"""Weights of the channels in a colour's grey (ITU-R 601-2, as in Pillow)."""


def jittered(pictures: Tensor, weights: Tensor) -> Tensor:
    """Pictures uint8 [B, 3, S, S] after the changes of colour that `transforms.jitter_weights` [B, 3] stand for.

    Levels are rounded and clipped once, at the end.
    """
    colour = pictures.to(torch.float32, memory_format=torch.contiguous_format)
    red, green, blue = (share * colour[:, channel] for channel, share in enumerate(GREY))
    grey = red + green + blue
    own, mixed, mean = weights[:, :, None, None].unbind(1)  # each [B, 1, 1]
    shift = mixed * grey + mean * grey.mean((1, 2), keepdim=True)
    return torch.addcmul(shift[:, None], colour, own[:, None]).round_().clamp_(0, 255).to(torch.uint8)


def views(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The model's and the image tokenizer's pictures, uint8 [I + P, 3, S, S] and [I + P, 3, S2, S2], on the device."""
    weights = None if batch.jitter is None else to_device(batch.jitter, device)

    def seen(pictures: Tensor) -> Tensor:
        pictures = to_device(pictures, device)
        return pictures if weights is None else jittered(pictures, weights)

    images = seen(batch.images)
    return images, images if batch.tokenizer_images is None else seen(batch.tokenizer_images)
