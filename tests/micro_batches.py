"""Random micro-batches of all three streams, with lengths and masks as uneven as real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.data.batch import MicroBatch, Samples
from beit3_dist.model import BEiT3
from beit3_dist.model.beit3 import MixedInputs
from beit3_dist.model.token_layout import TokenLayout, group
from beit3_dist.objectives.masked_data_modeling import NAME
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.tools.benchmarks.step import objectives_for

CPU = torch.device("cpu")


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
    captions = _texts(model, pairs, caption_length, 0.5, draw)
    words = _texts(model, texts, text_length, 0.15, draw)
    side, both = model.image_size, [images, pairs]
    pixels = torch.randint(0, 256, (images + pairs, 3, side, side), dtype=torch.uint8, generator=draw).split(both)
    masks = (torch.rand(images + pairs, model.patches, generator=draw) < 0.4).split(both)
    samples = images + pairs + texts
    ids = torch.randint(-(2**62), 2**62, (samples,), generator=draw).split([*both, texts])
    streams = {}
    for number, (name, text) in enumerate({"images": None, "pairs": captions, "texts": words}.items()):
        drawn = {"image_mask": masks[number]} if number < 2 else {}
        if text is not None:
            drawn |= {"text": text[0], "text_mask": text[2]}
        streams[name] = Samples(
            ids=ids[number],
            positions=torch.arange(len(ids[number])),
            images=pixels[number] if number < 2 else None,
            text=None if text is None else text[1],
            lengths=None if text is None else text[3],
            annotations={NAME: drawn},
        )
    return MicroBatch(streams)


def pretraining(model: BEiT3, seed: int = 0, **section: Any) -> PretrainingModule:
    """A model under masked data modelling, with these fields of its section."""
    return PretrainingModule(model, objectives_for(model.config, **section), seed)


def counts_of(module: PretrainingModule, batch: MicroBatch, device: torch.device = CPU) -> Tensor:
    """int64 [K]: the targets of each loss in a micro-batch."""
    return torch.tensor(module.objectives.counts(batch), device=device)


def prepared(module: PretrainingModule, batch: MicroBatch, device: torch.device = CPU) -> tuple[Any, ...]:
    """A micro-batch on the device, with `precomputed_codes`."""
    return module.objectives.prepare(batch, device, precomputed_codes(module.model.config))


def fused_and_alone(model: ModelConfig, seed: int = 0) -> tuple[MixedInputs, list[dict[str, Tensor]]]:
    """Images, pairs and texts, and the pairs' images and captions alone, too, hidden there and seen whole in the pairs:
    in one micro-batch, and as arguments of `BEiT3.encode`, kind by kind."""
    draw = torch.Generator().manual_seed(seed)
    side, samples = model.image_size, [3, 2, 2, 2, 4]
    images, of_pairs = torch.randn(5, 3, side, side, generator=draw).split([3, 2])
    keeps = (1.0 + (torch.rand(model.layers, 2, sum(samples), generator=draw) < 0.5)).split(samples, dim=2)
    hidden = (torch.rand(5, model.patches, generator=draw) < 0.4).split([3, 2])
    padding, texts = [], []
    for number, length in ((2, 9), (4, 14)):
        padding.append(torch.arange(length) >= torch.randint(3, length, (number, 1), generator=draw))
        texts.append(torch.randint(4, model.vocab_size, (number, length), generator=draw))
    captions: dict[str, Any] = {"text": texts[0], "text_padding": padding[0]}
    kinds = [
        {"images": images, "image_mask": hidden[0]},
        {"images": of_pairs, "image_mask": hidden[1]},
        {"images": of_pairs, **captions},
        captions,
        {"text": texts[1], "text_padding": padding[1]},
    ]
    patches = 1 + model.patches
    layout = TokenLayout(
        tuple(
            group(
                n,
                patches * ("images" in kind),
                kind.get("text_padding"),
                kind["text"].shape[1] if "text" in kind else 0,
            )
            for n, kind in zip(samples, kinds, strict=True)
        )
    )
    inputs = MixedInputs(
        images=torch.cat([images, of_pairs, of_pairs]),
        words=layout.packed([texts[0], texts[0], texts[1]]),
        layout=layout,
        image_mask=torch.cat([*hidden, torch.zeros_like(hidden[1])]),
        keep=torch.cat(keeps, dim=2),
    )
    return inputs, [kind | {"keep": keep} for kind, keep in zip(kinds, keeps, strict=True)]


def encoded_one_by_one(model: BEiT3, kinds: list[dict[str, Tensor]]) -> Tensor:
    """[T, D], as the model has the same in one micro-batch: all patches, then all words that are no padding."""
    patches, words = [], []
    for kind in kinds:
        hidden_BND, count = model.encode(**kind), (1 + model.config.patches) * ("images" in kind)
        patches.append(hidden_BND[:, :count].flatten(0, 1))
        if "text" in kind:
            words.append(hidden_BND[:, count:][~kind["text_padding"]])
    return torch.cat([*patches, *words])


def precomputed_codes(model: ModelConfig, seed: int = 0):
    """Codes in place of an image tokenizer: a function of the pixels, so that every layout sees the same."""

    def tokenize(pictures: Tensor) -> Tensor:
        brightness = pictures.long().flatten(1).sum(1, keepdim=True)
        patch = torch.arange(model.patches, device=pictures.device)
        return (brightness * 31 + patch * 17 + seed) % model.visual_vocab_size

    return tokenize
