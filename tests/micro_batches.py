"""Random micro-batches of all three streams, with lengths and masks as uneven as real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.data.batch import MicroBatch


def _texts(model: ModelConfig, samples: int, length: int, ratio: float, draw: torch.Generator) -> tuple[Tensor, ...]:
    lengths = torch.randint(3, length + 1, (samples,), generator=draw)
    ids = torch.randint(4, model.vocab_size, (samples, length), generator=draw)
    padding = torch.arange(length) >= lengths[:, None]
    ids[padding] = 1
    masked = (torch.rand(samples, length, generator=draw) < ratio) & ~padding
    masked[:, 0] = False
    masked[:, 1] = True  # at least one word of each text
    return torch.where(masked, 3, ids), ids, masked, lengths


def random_micro_batch(
    model: ModelConfig,
    *,
    images: int = 3,
    pairs: int = 2,
    texts: int = 4,
    caption_length: int = 9,
    text_length: int = 14,
    seed: int = 0,
) -> MicroBatch:
    """A micro-batch of random pixels, words and masks."""
    draw = torch.Generator().manual_seed(seed)
    captions, caption_targets, caption_mask, caption_lengths = _texts(model, pairs, caption_length, 0.5, draw)
    words, text_targets, text_mask, text_lengths = _texts(model, texts, text_length, 0.15, draw)
    side = model.image_size
    samples = images + pairs + texts
    return MicroBatch(
        images=torch.randint(0, 256, (images + pairs, 3, side, side), dtype=torch.uint8, generator=draw),
        tokenizer_images=None,
        image_mask=torch.rand(images + pairs, model.patches, generator=draw) < 0.4,
        captions=captions,
        caption_targets=caption_targets,
        caption_mask=caption_mask,
        caption_lengths=caption_lengths,
        texts=words,
        text_targets=text_targets,
        text_mask=text_mask,
        text_lengths=text_lengths,
        sample_ids=torch.randint(-(2**62), 2**62, (samples,), generator=draw),
        positions=torch.arange(samples),
        streams=torch.tensor([0] * images + [2] * pairs + [1] * texts),
        faults=[],
    )


def precomputed_codes(model: ModelConfig, seed: int = 0):
    """Codes in place of an image tokenizer: a function of the pixels, so that every layout sees the same."""

    def tokenize(pictures: Tensor) -> Tensor:
        brightness = pictures.long().flatten(1).sum(1, keepdim=True)
        patch = torch.arange(model.patches, device=pictures.device)
        return (brightness * 31 + patch * 17 + seed) % model.visual_vocab_size

    return tokenize
