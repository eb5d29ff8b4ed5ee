"""All micro-batches of a run in turn, put together where several loader processes make parts of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import count, islice
from typing import Any

import torch
from torch.nn.functional import pad

from beit3_dist.data.batch import MicroBatch, MixedBatches, Request, Samples
from beit3_dist.data.loader import loader


def micro_batches(
    batches: MixedBatches, requests: Iterator[Request], workers: int, prefetch: int, pin: bool
) -> Iterator[MicroBatch]:
    """One rank's micro-batches of endless requests. A loader process makes whole micro-batches where samples have
    random access. Virtual readers of sequential streams stay in one process each, so that every process makes its part
    of every micro-batch; `loader` deals out requests in turn, and a reader that is asked out of turn says so."""
    if not batches.sequential or workers <= 1:
        return iter(loader(batches, requests, workers, prefetch, pin))
    parts = (request._replace(part=part, parts=workers) for request in requests for part in range(workers))
    made = iter(loader(batches, parts, workers, prefetch, pin=False))
    whole = (joined(list(islice(made, workers)), batches.tokenizer.pad) for _ in count())
    return (batch.pin_memory() for batch in whole) if pin else whole


def joined(parts: list[MicroBatch], padding: int) -> MicroBatch:
    """The micro-batch of the parts' samples, in the order of their places in the step. `padding`: the id of <pad>."""
    return MicroBatch(
        streams={name: _joined([part.streams[name] for part in parts], padding) for name in parts[0].streams},
        faults=[fault for part in parts for fault in part.faults],
        readers=torch.cat([part.readers for part in parts]),
    )


def _joined(parts: list[Samples], padding: int) -> Samples:
    order = torch.cat([part.positions for part in parts]).argsort()

    def together(name: str, values: list[Any]) -> Any:
        """A field of all parts' samples; what has an entry for each token is padded to one width."""
        if isinstance(values[0], dict):
            return {key: together(key, [value[key] for value in values]) for key in values[0]}
        if values[0] is None:
            return None
        if name.startswith("text"):
            width = max(value.shape[1] for value in values)
            fill = padding if values[0].dtype is torch.int64 else 0
            values = [pad(value, (0, width - value.shape[1]), value=fill) for value in values]
        return torch.cat(values)[order]

    names = [field.name for field in fields(Samples)]
    return Samples(**{name: together(name, [getattr(part, name) for part in parts]) for name in names})
