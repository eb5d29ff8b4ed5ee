"""All micro-batches of a run in turn, put together where several loader processes make parts of each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import torch
from torch import Tensor
from torch.nn.functional import pad

from beit3_dist.data.batch import MicroBatch, MixedBatches, Request
from beit3_dist.data.loader import loader
from beit3_dist.data.order import Stream


def micro_batches(
    batches: MixedBatches, requests: Iterator[Request], workers: int, prefetch: int, pin: bool
) -> Iterator[MicroBatch]:
    """One rank's micro-batches of endless requests.

    A loader process makes whole micro-batches where samples have random access. Virtual readers of sequential streams
    stay in one process each, so that every process makes its part of every micro-batch; `loader` deals out requests in
    turn, and a reader that is asked out of turn says so.
    """
    if not batches.sequential or workers <= 1:
        return iter(loader(batches, requests, workers, prefetch, pin))
    parts = (request._replace(part=part, parts=workers) for request in requests for part in range(workers))
    made = iter(loader(batches, parts, workers, prefetch, pin=False))
    whole = (joined(list(islice(made, workers)), batches.tokenizer.pad) for _ in count())
    return (batch.pin_memory() for batch in whole) if pin else whole


def joined(parts: list[MicroBatch], padding: int) -> MicroBatch:
    """The micro-batch that the parts make up, its samples in the order of their places in the step."""
    streams, positions = (torch.cat([getattr(part, name) for part in parts]) for name in ("streams", "positions"))
    order = positions.argsort()
    images, texts, pairs = (order[streams[order] == stream] for stream in Stream)

    def together(name: str, kinds: tuple[Stream, ...], rows: Tensor, fill: int = 0) -> Tensor:
        """A field that only samples of these streams have, for the samples `rows`."""
        values = [getattr(part, name) for part in parts]
        if values[0].ndim == 2 and name != "image_mask":
            width = max(value.shape[1] for value in values)
            values = [pad(value, (0, width - value.shape[1]), value=fill) for value in values]
        has = torch.isin(streams, torch.tensor(kinds))
        return torch.cat(values)[(has.cumsum(0) - 1)[rows]]

    def pictures(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        rows = torch.cat([images, pairs])
        return None if values[0] is None else together(name, (Stream.IMAGES, Stream.PAIRS), rows)

    def words(name: str, kind: Stream, rows: Tensor) -> dict[str, Tensor]:
        return {
            field: together(field, (kind,), rows, fill)
            for field, fill in (
                (f"{name}s", padding),
                (f"{name}_targets", padding),
                (f"{name}_mask", 0),
                (f"{name}_lengths", 0),
            )
        }

    rows = torch.cat([images, pairs, texts])
    return MicroBatch(
        **{name: pictures(name) for name in ("images", "tokenizer_images", "jitter", "image_mask")},  # type: ignore[arg-type]
        **words("caption", Stream.PAIRS, pairs),
        **words("text", Stream.TEXTS, texts),
        sample_ids=torch.cat([part.sample_ids for part in parts])[rows],
        positions=positions[rows],
        streams=streams[rows],
        faults=[fault for part in parts for fault in part.faults],
        readers=torch.cat([part.readers for part in parts]),
    )
