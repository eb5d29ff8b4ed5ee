"""From a micro-batch on the host to the model's inputs and targets on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.data.batch import MicroBatch, hash_terms
from beit3_dist.data.views import Tokenize, views
from beit3_dist.model.beit3 import MixedInputs
from beit3_dist.model.layout import Group, Layout, group, to_device
from beit3_dist.objectives.masked_data_modeling import STREAMS, Targets
from beit3_dist.train.flops import training_flops
from beit3_dist.train.totals import Totals


def normalize(pixels: Tensor) -> Tensor:
    """uint8 pictures -> [-1, 1] (mean and deviation 0.5, as in the released models' fine-tuning)."""
    return pixels.float() / 127.5 - 1.0


def layout_of(batch: MicroBatch) -> Layout:
    """The layout of a micro-batch that lies on the host."""
    patches = 1 + batch.image_mask.shape[1]
    return Layout(
        images=group(batch.num_images, patches, None),
        pairs=_texts(patches, batch.caption_lengths, batch.captions.shape[1]),
        texts=_texts(0, batch.text_lengths, batch.texts.shape[1]),
    )


def _texts(patches: int, lengths: Tensor, capacity: int) -> Group:
    padding = torch.arange(capacity) >= lengths[:, None]
    return group(len(lengths), patches, padding, capacity)


def masked_counts(batch: MicroBatch) -> list[int]:
    """Masked positions of a micro-batch per loss, in the order of `STREAMS`."""
    images, pairs = batch.image_mask[: batch.num_images], batch.image_mask[batch.num_images :]
    return [int(mask.sum()) for mask in (images, batch.text_mask, pairs, batch.caption_mask)]


def host_totals(batches: list[MicroBatch], model: ModelConfig) -> Totals:
    """Of a rank's micro-batches; the counts are those of masked positions."""
    return Totals.summed((_totals(batch, model) for batch in batches), len(STREAMS))


def _totals(batch: MicroBatch, model: ModelConfig) -> Totals:
    counts = masked_counts(batch)
    words = int(batch.caption_lengths.sum() + batch.text_lengths.sum())
    flops = training_flops(
        model,
        batch.num_images,
        batch.caption_lengths,
        batch.text_lengths,
        masked_patches=counts[0] + counts[2],
        masked_words=counts[1] + counts[3],
    )
    return Totals(
        counts,
        tokens=(batch.num_images + batch.num_pairs) * (1 + model.patches) + words,
        flops=flops,
        replaced=len(batch.faults),
        hash_terms=hash_terms(batch),
    )


def prepare(
    batch: MicroBatch, device: torch.device, tokenize: Tokenize | None
) -> tuple[MixedInputs, Targets | None, Tensor]:
    """Inputs, targets and sample ids on `device` of a micro-batch on the host; no targets where `tokenize` is None.

    Every index is made on the host, so that the device never has to be waited for.
    """

    def move(tensor: Tensor) -> Tensor:
        return to_device(tensor, device)

    layout = layout_of(batch)
    real = (layout.pairs.index, layout.texts.index)

    def packed(captions: Tensor, texts: Tensor) -> Tensor:
        return torch.cat(
            [
                words.flatten() if index is None else words.flatten()[index]
                for words, index in zip((captions, texts), real, strict=True)
            ]
        )

    images, tokenizer_images = views(batch, device)
    inputs = MixedInputs(
        images=normalize(images),
        words=move(packed(batch.captions, batch.texts)),
        layout=layout.to(device),
        image_mask=move(batch.image_mask),
    )
    if tokenize is None:
        return inputs, None, move(batch.sample_ids)
    patches = batch.image_mask.shape[1]
    masked = batch.image_mask.flatten().nonzero().squeeze(1)  # over [I + P, patches]
    image_rows = masked // patches * (1 + patches) + 1 + masked % patches  # CLS stands before each picture's patches
    predict = packed(batch.caption_mask, batch.text_mask).nonzero().squeeze(1)
    text_rows = layout.segments[0] + layout.segments[1] + predict
    codes = tokenize(tokenizer_images)
    image, text, pair_image, pair_text = masked_counts(batch)
    targets = Targets(
        image_rows=move(image_rows),
        codes=codes.flatten()[move(masked)],
        text_rows=move(text_rows),
        words=move(packed(batch.caption_targets, batch.text_targets)[predict]),
        counts=(image, text, pair_image, pair_text),
    )
    return inputs, targets, move(batch.sample_ids)
