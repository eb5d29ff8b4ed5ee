"""Held-out validation: the training losses and accuracies on samples that are never trained on."""

from __future__ import annotations

from itertools import islice

import torch
import torch.distributed as dist

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MixedBatches, requests_from
from beit3_dist.parallel.engine import Engine
from beit3_dist.training.image_codes import PrecomputedCodes, targets_of
from beit3_dist.training.inputs import Tokenize, host_totals, prepare
from beit3_dist.training.metrics import losses_and_accuracies


def evaluate(
    config: RunConfig, engine: Engine, held_out: MixedBatches, codes: PrecomputedCodes | None, tokenize: Tokenize
) -> dict[str, float]:
    """Losses and accuracies over the first `eval.batches` batches of the held-out streams. Collective.

    The samples, crops and masks are the same every time; a stream with fewer samples starts over.
    `codes`: precomputed image targets; None: `tokenize` makes them.
    """
    device = engine.mesh.device
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    cross_entropy, correct = [0.0] * 4, [0.0] * 4
    for request in islice(requests_from((0, 0, 0), config.batch), config.eval.batches * config.batch.accumulation):
        batch = held_out[request]
        counts += host_totals([batch], config.model)[:4].to(device)
        result = engine.evaluate([prepare(batch, device, targets_of(batch, codes, tokenize))])
        cross_entropy = [a + b for a, b in zip(cross_entropy, result.cross_entropy, strict=True)]
        correct = [a + b for a, b in zip(correct, result.correct, strict=True)]
    dist.all_reduce(counts)
    return losses_and_accuracies(cross_entropy, correct, counts.tolist(), config.objective.weights)
