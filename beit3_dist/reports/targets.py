"""What a sample of the training data says about the targets of a run, and what its visual codes look like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from beit3_dist.data.batch import MicroBatch, requests_from
from beit3_dist.data.views import SeenImages
from beit3_dist.image_tokenizer.drawing import mean_patches, patches_of
from beit3_dist.image_tokenizer.targets import ImageTargets
from beit3_dist.objectives.base import Loss
from beit3_dist.reports.opened import SAMPLES_AT_ONCE, Run

SAMPLES = 2048
"""Training samples of each stream that the entropies, the baselines and the looks of the codes come from."""


@dataclass(frozen=True)
class TrainingSample:
    """What a sample of training batches says about the targets."""

    samples: int
    """Samples of each stream."""
    counts: dict[str, Tensor]
    """Loss -> int64 [classes]: how often each code or word is its target."""
    patches: Tensor | None
    """uint8 [codes, 3, p, p]: what each code looks like; None: there are no codes."""


@torch.no_grad()
def sample_training(run: Run, device: torch.device) -> TrainingSample:
    """Tallies the targets and the patches of the first `SAMPLES` training samples of each stream."""
    model = run.config.model
    counts = {loss.name: torch.zeros(loss.classes, dtype=torch.int64) for loss in watched(run)}
    sums = torch.zeros(model.visual_vocab_size, 3 * model.patch_size**2, dtype=torch.float64)
    carriers = torch.zeros(model.visual_vocab_size, dtype=torch.int64)
    number = math.ceil(SAMPLES / SAMPLES_AT_ONCE)
    for request in islice(requests_from((0, 0, 0), run.train.config.batch), number):
        batch = run.train[request]
        codes = codes_of(run, batch, device)
        _, reading, _ = run.objectives.prepare(batch, device, codes, embeds=False)
        assert reading is not None
        for loss, classes in run.objectives.classes(reading):
            if loss.name in counts:
                counts[loss.name] += torch.bincount(classes.cpu(), minlength=loss.classes)
        if codes is not None:
            pixels = patches_of(SeenImages(batch, torch.device("cpu")).model, model.patch_size).flatten(1).double()
            sums.index_add_(0, codes.cpu().flatten(), pixels)
            carriers += torch.bincount(codes.cpu().flatten(), minlength=len(carriers))
    if run.image_tokenizer is None:
        return TrainingSample(number * SAMPLES_AT_ONCE, counts, None)
    codebook = run.image_tokenizer.quantize.embedding.weight.cpu()
    patches = mean_patches(sums, carriers, codebook).unflatten(1, (3, model.patch_size, model.patch_size))
    return TrainingSample(number * SAMPLES_AT_ONCE, counts, patches)


def watched(run: Run) -> list[Loss]:
    """The losses whose targets are classes."""
    return [loss for loss in run.objectives.losses if loss.classes]


def codes_of(run: Run, batch: MicroBatch, device: torch.device) -> Tensor | None:
    """int64 [I, patches] on the device; None where there are no codes."""
    if run.image_tokenizer is None:
        return None
    return ImageTargets(run.image_tokenizer, device)(SeenImages(batch, device).tokenizer)


def baseline(counts: Tensor) -> float:
    """Share of the most frequent target."""
    return float(counts.max() / counts.sum())
