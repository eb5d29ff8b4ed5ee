"""The codebook of the image tokenizer: which code a vector gets, and how the codes follow the vectors.

Shapes: K codes, C code dimension, M vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_dist.model.initialization import named_generator
from beit3_dist.model.token_layout import to_device
from beit3_dist.parallel.collectives import all_gather


class Codebook(nn.Module):
    """The tables of the released files, none of them trained by gradients."""

    weight: Tensor
    """[K, C] unit vectors."""
    cluster_size: Tensor
    """[K] vectors per code at k-means initialisation."""
    embed_avg: Tensor
    """[K, C] zeros; in the files only."""
    initted: Tensor
    """[1] one when `weight` holds usable vectors."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(codes, dim))
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", torch.zeros(codes, dim))
        self.register_buffer("initted", torch.ones(1))


@dataclass(frozen=True)
class CodeUsage:
    """How one step's vectors, of all data-parallel ranks, were spread over the codebook."""

    share: float
    """Codes that were used at least once, as a share of the codebook."""
    perplexity: float
    """Exponential of the entropy of the codes: the number of equally frequent codes that would be as diverse."""


@dataclass(frozen=True)
class Clusters:
    """One step's vectors, of all data-parallel ranks, by their codes."""

    counts: Tensor
    """[K] vectors of each code."""
    sums: Tensor
    """[K, C] their sums."""

    def usage(self) -> Tensor:
        """[2] `CodeUsage`'s numbers on the device: the host reads them when it waits for the device anyway."""
        shares = self.counts / self.counts.sum()
        return torch.stack(((self.counts > 0).float().mean(), torch.special.entr(shares).sum().exp()))


class Quantizer(nn.Module):
    """Nearest-neighbour quantisation on the unit sphere with a codebook that follows the vectors by moving averages.

    `codes` and `look_up` are pure. `initialize` and `update` change the codebook; every data-parallel rank must call
    them and `clusters` together, with as many vectors each, and all ranks end with the same tables.
    """

    KMEANS_ROUNDS = 10
    DISTANCES = 1 << 25
    """Distances of vectors from codes that are in memory at a time (128 MiB)."""
    DEAD_SHARE = 0.1
    """A code is dead when its moving count falls below this share of the mean count. The paper has no revival."""

    cluster_size: Tensor
    """[K] moving average of the vectors per step that chose each code."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = Codebook(codes, dim)
        self.register_buffer("cluster_size", torch.zeros(codes))

    def codes(self, z: Tensor) -> Tensor:
        """[..., C] unit vectors -> [...] int64 codes, by the smallest squared Euclidean distance."""
        weight = self.embedding.weight
        squares = weight.square().sum(-1)
        # |z - w|^2 without |z|^2, which is the same for every code.
        some = z.flatten(0, -2).split(max(1, self.DISTANCES // len(weight)))
        codes = [torch.addmm(squares, part, weight.t(), alpha=-2).argmin(-1) for part in some]
        return torch.cat(codes).unflatten(0, z.shape[:-1])

    def look_up(self, codes: Tensor) -> Tensor:
        """[...] codes -> [..., C] codebook vectors."""
        return F.embedding(codes, self.embedding.weight)

    @torch.no_grad()
    def initialize(self, z: Tensor, key: int) -> None:
        """Sets the codebook by spherical k-means on the vectors [..., C] of all ranks, starting from a keyed draw.

        The vectors are gathered in rank order, which is sample order, so any number of ranks gives the same codebook.
        """
        vectors = z.flatten(0, -2)
        if dist.group.WORLD is not None:
            vectors = all_gather(vectors, dist.group.WORLD)
        codes, dim = self.embedding.weight.shape
        order = torch.randperm(len(vectors), generator=named_generator(key, "k-means")).to(z.device)
        # Fewer vectors than codes: some are taken more than once, and update() revives the codes that stay unused.
        self.embedding.weight.copy_(vectors[order[torch.arange(codes, device=z.device) % len(order)]])
        for _ in range(self.KMEANS_ROUNDS):
            counts, sums = cluster(vectors, self.codes(vectors), codes)
            used = (counts > 0)[:, None]
            self.embedding.weight.copy_(torch.where(used, F.normalize(sums, dim=-1), self.embedding.weight))
        if dist.is_initialized():
            dist.broadcast(self.embedding.weight, src=0)
            dist.broadcast(counts, src=0)
        self.embedding.cluster_size.copy_(counts)
        self.embedding.embed_avg.zero_()
        self.embedding.initted.fill_(1)
        self.cluster_size.copy_(counts)

    @torch.no_grad()
    def clusters(self, z: Tensor, codes: Tensor) -> Clusters:
        """The vectors z [..., C] by their codes [...], over all ranks."""
        counts, sums = cluster(z.flatten(0, -2), codes.flatten(), len(self.embedding.weight))
        all_reduce(counts)
        all_reduce(sums)
        return Clusters(counts, sums)

    @torch.no_grad()
    def update(self, z: Tensor, clusters: Clusters, key: int, decay: float = 0.99) -> None:
        """Moves the codebook towards the step's vectors z [..., C] of this rank, `clusters` over all ranks.

        A used code becomes normalize(decay * code + (1 - decay) * mean direction of its vectors); the others keep
        their value. Dead codes then jump to vectors of this step, drawn by `key`, and get the mean count: time to
        prove themselves.
        """
        vectors, weight = z.flatten(0, -2), self.embedding.weight
        counts, sums = clusters.counts, clusters.sums
        moved = F.normalize(decay * weight + (1 - decay) * F.normalize(sums, dim=-1), dim=-1)
        weight.copy_(torch.where((counts > 0)[:, None], moved, weight))
        self.cluster_size.lerp_(counts, 1 - decay)

        mean = self.cluster_size.mean()
        dead = self.cluster_size < self.DEAD_SHARE * mean
        weight.copy_(torch.where(dead[:, None], self.drawn(vectors, key), weight))
        self.cluster_size.copy_(torch.where(dead, mean, self.cluster_size))

    def drawn(self, vectors: Tensor, key: int) -> Tensor:
        """[K, C]: one vector per code, drawn with repeats from the vectors [M, C] of every rank.

        Each rank fills in the rows it holds and the sum puts them together, so no rank gathers all vectors.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        codes, count = len(self.embedding.weight), len(vectors)
        rows = torch.randint(count * world, (codes,), generator=named_generator(key, "revival"))
        rows = to_device(rows, vectors.device)
        mine = rows // count == rank
        picked = torch.where(mine[:, None], vectors[rows % count], 0.0)
        all_reduce(picked)
        return picked


def cluster(vectors: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Counts [K] and sums [K, C] of the vectors [M, C] by their codes [M]."""
    counts = vectors.new_zeros(size).index_add_(0, codes, vectors.new_ones(len(codes)))  # bincount waits for the device
    return counts, vectors.new_zeros(size, vectors.shape[-1]).index_add_(0, codes, vectors)


def all_reduce(x: Tensor) -> None:
    """Sums x over the ranks in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
