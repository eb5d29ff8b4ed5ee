"""Functions of whole matrices, whose elements lie on several ranks.

Each matrix has an owner among the replicas, the one that holds most of it: it is sent the others' elements, computes,
and sends back to each its own. Below ZeRO-3 nearly every matrix lies on one rank as a whole and nothing is sent; at
ZeRO-3 all replicas own equally many elements. Tensor ranks, whose owners own the same matrices, exchange their parts of
one and compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.model.cut import Cut
from beit3_dist.optimizers.base import Place, Places

BATCH = 1 << 26
"""Elements of the matrices that are exchanged at a time, or of one larger matrix."""

Function = Callable[[Tensor], Tensor]
"""Matrix -> one of its shape."""
Pieces = list[tuple[Place, Tensor]]
"""For each matrix where this rank's elements lie, and what they are, 1-D."""


def whole_shape(place: Place, places: Places) -> tuple[int, ...]:
    """Shape of the matrix that tensor ranks may have cut (into equal parts, as hidden matrices are)."""
    parts = 1 if places.tensor is None else places.tensor.size()
    return tuple(n * parts if d == place.cut else n for d, n in enumerate(place.shape))


def on_whole_matrices(function: Function, pieces: Pieces, places: Places) -> Iterator[Tensor]:
    """For each matrix this rank's elements of what the function makes of it, 1-D. Collective."""
    if places.data is None:
        for place, piece in pieces:
            yield _of_part(function, piece.view(place.shape), place, places).flatten()
        return
    first = 0
    while first < len(pieces):
        size = last = 0
        for last in range(first, len(pieces)):
            size += prod(pieces[last][0].shape)
            if size > BATCH and last > first:
                last -= 1
                break
        yield from _exchanged(function, pieces[first : last + 1], places, places.data)
        first = last + 1


def owners(shares: list[Place]) -> list[int]:
    """For each matrix the replica that computes: one that holds most of it, of several the one with least to do."""
    load, found = [0] * len(shares[0].spans), []
    for place in shares:
        most = max(numel for _, numel in place.spans)
        able = [rank for rank, (_, numel) in enumerate(place.spans) if numel == most]
        found.append(owner := min(able, key=load.__getitem__))
        load[owner] += prod(place.shape)
    return found


def _exchanged(function: Function, pieces: Pieces, places: Places, replicas: dist.ProcessGroup) -> Iterator[Tensor]:
    """`on_whole_matrices` of some matrices in one exchange there and one back."""
    shares = [place for place, _ in pieces]
    rank, world, of = shares[0].rank, replicas.size(), owners(shares)
    mine = [place for place, owner in zip(shares, of, strict=True) if owner == rank]
    theirs = [[i for i, owner in enumerate(of) if owner == other] for other in range(world)]
    # What this rank holds of each owner's matrices, one behind the other, and what each rank holds of its own.
    given = [sum(shares[i].numel for i in those) for those in theirs]
    taken = [sum(place.spans[other][1] for place in mine) for other in range(world)]
    sent = torch.cat([pieces[i][1] for those in theirs for i in those])
    received = sent.new_empty(sum(taken))
    dist.all_to_all_single(received, sent, taken, given, group=replicas)
    elements = [chunk.split([p.spans[other][1] for p in mine]) for other, chunk in enumerate(received.split(taken))]
    for number, place in enumerate(mine):
        part = torch.cat([by_rank[number] for by_rank in _in_order(elements, place)]).view(place.shape)
        result = _of_part(function, part, place, places).flatten()
        for other, (start, numel) in enumerate(place.spans):
            elements[other][number].copy_(result[start : start + numel])
    dist.all_to_all_single(sent, received, given, taken, group=replicas)
    results = iter(sent.split([shares[i].numel for those in theirs for i in those]))
    back = {i: next(results) for those in theirs for i in those}
    yield from (back[i] for i in range(len(pieces)))


def _in_order(elements: list[tuple[Tensor, ...]], place: Place) -> list[tuple[Tensor, ...]]:
    """The replicas' elements in the order in which they lie in the matrix."""
    return [elements[rank] for rank in sorted(range(len(elements)), key=lambda rank: place.spans[rank])]


def _of_part(function: Function, part: Tensor, place: Place, places: Places) -> Tensor:
    """This tensor rank's part of the function of the whole matrix."""
    if places.tensor is None or place.cut is None:
        return function(part)
    rank, parts = dist.get_rank(places.tensor), places.tensor.size()
    everyones = [torch.empty_like(part) for _ in range(parts)]
    dist.all_gather(everyones, part.contiguous(), group=places.tensor)
    return Cut(place.cut, rank, parts).of(function(torch.cat(everyones, dim=place.cut)))
