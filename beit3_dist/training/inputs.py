"""From a micro-batch on the host to the model's inputs and targets on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beit3_dist.data.batch import MicroBatch
from beit3_dist.model.beit3 import MixedInputs
from beit3_dist.model.layout import Group, Layout, group
from beit3_dist.objectives.masked_data_modeling import Targets


def normalize(pixels: Tensor) -> Tensor:
    """uint8 pictures -> [-1, 1] (mean and deviation 0.5, as in the released models' fine-tuning)."""
    return pixels.float() / 127.5 - 1.0


def _group_of_texts(patches: int, lengths: Tensor, capacity: int) -> Group:
    padding = torch.arange(capacity) >= lengths[:, None]
    return group(len(lengths), patches, padding, capacity)


def layout_of(batch: MicroBatch) -> Layout:
    """The layout of a micro-batch that lies on the host."""
    patches = 1 + batch.image_mask.shape[1]
    return Layout(images=group(batch.num_images, patches, None),
                  pairs=_group_of_texts(patches, batch.caption_lengths, batch.captions.shape[1]),
                  texts=_group_of_texts(0, batch.text_lengths, batch.texts.shape[1]))


def masked_counts(batch: MicroBatch) -> Tensor:
    """Masked positions of a micro-batch per loss, int64 [4] in the order of STREAMS."""
    images = batch.image_mask[:batch.num_images].sum()
    pairs = batch.image_mask[batch.num_images:].sum()
    return torch.stack([images, batch.text_mask.sum(), pairs, batch.caption_mask.sum()])


def prepare(batch: MicroBatch, layout: Layout, device: torch.device | str,
            tokenize: Callable[[Tensor], Tensor]) -> tuple[MixedInputs, Targets]:
    """Turns a micro-batch on the host into inputs and targets on `device`.

    Every index is made on the host, so the device never has to be waited for. `tokenize`: uint8 pictures
    [B, 3, S, S] on the device -> visual codes [B, patches].
    """
    move = lambda t: t.to(device, non_blocking=True)  # noqa: E731
    patches = batch.image_mask.shape[1]

    masked = batch.image_mask.flatten().nonzero().squeeze(1)  # over [I + P, patches]
    image_rows = masked // patches * (1 + patches) + 1 + masked % patches

    real = [g.index for g in (layout.pairs, layout.texts)]
    packed = lambda captions, texts: torch.cat(  # noqa: E731
        [t.flatten() if index is None else t.flatten()[index] for t, index in zip((captions, texts), real, strict=True)])
    predict = packed(batch.caption_mask, batch.text_mask).nonzero().squeeze(1)
    text_rows = layout.segments[0] + layout.segments[1] + predict

    images = move(batch.images)
    codes = tokenize(images if batch.tokenizer_images is None else move(batch.tokenizer_images))
    if codes.shape[1] != patches:
        raise ValueError(f"image_tokenizer gives {codes.shape[1]} codes per picture, the model has {patches} patches: "
                         "set data.tokenizer_image_size or model.patch_size")
    inputs = MixedInputs(images=normalize(images), words=move(packed(batch.captions, batch.texts)),
                         layout=layout.to(device, non_blocking=True), image_mask=move(batch.image_mask))
    targets = Targets(image_rows=move(image_rows), codes=codes.flatten()[move(masked)], text_rows=move(text_rows),
                      words=move(packed(batch.caption_targets, batch.text_targets)[predict]),
                      counts=tuple(masked_counts(batch).tolist()))
    return inputs, targets
