"""FLOPs of a run's model, for MFU: as train/flops.py counts them, of texts and captions at their expected lengths."""

from __future__ import annotations

import torch

from beit3_dist.config import STREAMS, RunConfig
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.plan.counting import caption_lengths, read_tokens
from beit3_dist.train.flops import pretraining_flops


def step_flops(config: RunConfig) -> float:
    """Of a whole step, over all devices."""
    objectives = objectives_of(config)
    samples = {name: getattr(config.batch, name) for name in STREAMS}
    captions = caption_lengths(samples["pairs"], config.data.caption_length)
    texts = torch.full((samples["texts"],), config.data.text_length)
    read, _ = read_tokens(objectives, samples)
    counts = [n for each in objectives for n in each.expected_counts(samples, config)]
    flops = pretraining_flops(objectives, samples["images"], captions, texts, read, [round(n) for n in counts])
    if second := sum(each.second_pairs(samples) for each in objectives):
        captions, nothing = caption_lengths(second, config.data.caption_length), [0] * len(counts)
        flops += pretraining_flops(objectives, 0, captions, texts[:0], (0, 0, second, 0), nothing)
    return flops
