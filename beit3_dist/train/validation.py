"""Held-out validation: the training losses and accuracies on samples that are never trained on."""

from __future__ import annotations

from functools import partial
from itertools import islice

import torch

from beit3_dist.config import RunConfig
from beit3_dist.data.batch import MixedBatches, requests_from
from beit3_dist.data.loader import loader
from beit3_dist.data.views import Tokenize
from beit3_dist.image_tokenizer.codes import PrecomputedCodes, targets_of
from beit3_dist.objectives.together import Objectives
from beit3_dist.parallel.engine import Engine
from beit3_dist.run.preemption import Together, by_itself
from beit3_dist.train.averages import WeightAverage
from beit3_dist.train.feed import Feed
from beit3_dist.train.metrics import losses_and_accuracies
from beit3_dist.train.passes import passes


def evaluate(
    config: RunConfig,
    objectives: Objectives,
    engine: Engine,
    feed: Feed,
    held_out: MixedBatches,
    codes: PrecomputedCodes | None,
    tokenize: Tokenize | None,
    average: WeightAverage | None,
    together: Together = by_itself,
) -> dict[str, float]:
    """Losses and accuracies over the first `eval.batches` batches of the held-out streams. Collective.

    The samples, crops and masks are the same every time; a stream with fewer samples starts over. They are read as the
    training's are, by `data.workers` processes, which live as long as the validation.
    `codes`: precomputed image targets; None: `tokenize` makes them. `average`: of the weights, where it teaches.
    `together`: how the processes read.
    """
    requests = list(islice(requests_from((0, 0, 0), config.batch), config.eval.batches * config.accumulation))
    workers, pin = min(config.data.workers, len(requests)), engine.mesh.device.type == "cuda"
    micro_batches = iter(loader(held_out, requests, workers, config.data.prefetch, pin) if feed.reads else ())
    number, codes_of = len(objectives.told), partial(targets_of, codes=codes, tokenize=tokenize)
    counts = torch.zeros(number, dtype=torch.int64, device=engine.mesh.device)
    totals, correct = [0.0] * number, [0.0] * number
    for _ in range(config.eval.batches):
        batch = feed.step(lambda: list(islice(micro_batches, config.accumulation)), together)
        counts += batch.step_counts
        result = engine.evaluate(passes(objectives, engine, batch, codes_of, average))
        totals = [a + b for a, b in zip(totals, result.losses, strict=True)]
        correct = [a + b for a, b in zip(correct, result.correct, strict=True)]
    return losses_and_accuracies(objectives.told, totals, correct, counts.tolist())
