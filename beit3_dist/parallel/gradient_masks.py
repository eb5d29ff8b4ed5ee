"""Gradient masking: which stream's gradient each weight of the shared encoder takes (ViT-BERT, Li et al. 2021).

    G = M * g_text + (1 - M) * g_image,   M in {0, 1} for each weight, 1 at the start

After some steps a further share of all weights is set to 0, those with the smallest magnitudes of the texts'
gradients, until a given share is 0. The paper says neither how gradients are gathered for that nor whether the
threshold is one for all: here it is one, and magnitudes are those of the optimizer's first moment, the running mean of
what a weight with M = 1 takes, the texts' gradient alone. So there is no second gradient to keep, and every replica and
tensor rank chooses among the moments that it holds.

M is applied to the gradient of every backward pass, of one stream at a time, before replicas add theirs up. Where ZeRO
shares out the weights, it shares out M: a rank holds a bit for each weight that it updates, and the replicas put
together M of one parameter after the other, while the backward pass comes to it: an eighth of a byte a weight, beside
the gradient's four.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.model.cut import cut_for
from beit3_dist.parallel.fragments import Fragment, create_optimizer_state, fragments, optimizer_state
from beit3_dist.parallel.mesh import Groups

TEXT_MASK = "/text_mask"
"""What is added to the name of a weight whose M is meant."""
BITS = 8


def packed(mask: Tensor) -> Tensor:
    """bool [n] -> uint8 [n / 8, rounded up], a bit each."""
    padded = nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % BITS)).view(-1, BITS)
    return (padded << torch.arange(BITS, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """The reverse: bool [count]."""
    shifted = bits[:, None] >> torch.arange(BITS, dtype=torch.uint8, device=bits.device)
    return (shifted & 1).flatten()[:count].bool()


@dataclass
class Part:
    """M of elements [start, start + numel) of a flattened parameter."""

    start: int
    numel: int
    bits: Tensor
    """Packed with the bits of the whole parameter, of which these are the bytes that hold one of this part: so parts
    that meet within a byte add up to it."""

    @classmethod
    def of(cls, start: int, mask: Tensor) -> Part:
        """From bool [n]."""
        return cls(start, len(mask), packed(nn.functional.pad(mask, (start % BITS, 0))))

    @property
    def mask(self) -> Tensor:
        """bool [n]."""
        before = self.start % BITS
        return unpacked(self.bits, before + self.numel)[before:]


def is_shared(name: str) -> bool:
    """Whether both streams' tokens pass a parameter of this name."""
    return name.startswith("blocks.") and ".shared." in name


class GradientMasks:
    """M of this rank's part of the model."""

    def __init__(self, model: nn.Module, optimizer: Any, groups: Groups, cuts: dict[str, int], zero_stage: int) -> None:
        self._model, self._optimizer, self._groups, self._cuts = model, optimizer, groups, cuts
        self._zero_stage, self.takes_text = zero_stage, True
        """`takes_text`: whether the coming backward pass is of texts, else of images."""
        self._counts: dict[str, int] = {}
        parameters: Iterable[tuple[str, Any]] = model.named_parameters()
        for name, parameter in parameters:
            if is_shared(name) and parameter.requires_grad:
                self._counts[name] = getattr(parameter, "ds_numel", parameter.numel())
                parameter.register_hook(partial(self._masked, name))
        device = groups.mesh.device
        self.parts = {
            f.name: Part.of(f.start, torch.ones(f.numel, dtype=torch.bool, device=device)) for f in self._held()
        }
        """Of each parameter that the masks are of, what this rank updates of it; a rank may have nothing of one."""

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        """Of the gradient of one stream what this parameter takes."""
        mask = self.mask(name).view_as(gradient)
        return gradient * (mask if self.takes_text else ~mask)

    def mask(self, name: str) -> Tensor:
        """M of this rank's part of the model, of one parameter, bool [n]. Collective over the replicas."""
        count, part = self._counts[name], self.parts.get(name)
        bits = torch.zeros(-(-count // BITS), dtype=torch.uint8, device=self._groups.mesh.device)
        if part is not None:
            bits[part.start // BITS :][: len(part.bits)] = part.bits
        if self._zero_stage > 0:
            dist.all_reduce(bits, group=self._groups.data)
        return unpacked(bits, count)

    def tighten(self, share: float) -> None:
        """Sets so many zeros that they are this share of all weights, behind those that are there. Collective."""
        create_optimizer_state(self._optimizer, held := self._held(), 0)
        counted = [f for f in held if self._counts_here(f)]
        device = self._groups.mesh.device
        ones = [self.parts[f.name].mask for f in counted]
        total = self._sum(sum(f.numel for f in counted))
        wanted = round(share * total) - (total - self._sum(sum(int(some.sum()) for some in ones)))
        if wanted <= 0:
            return
        # Of numbers that are not negative, the order is that of their bits as whole numbers.
        magnitudes = [next(iter(optimizer_state(self._optimizer, f).values())).abs() for f in counted]
        chosen = [m[some].view(torch.int32) for m, some in zip(magnitudes, ones, strict=True)]
        mine = torch.cat([torch.zeros(0, dtype=torch.int32, device=device), *chosen])
        low, high = -1, 2**31 - 1  # at most `low`: too few; at most `high`: enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._sum(int((mine <= middle).sum())) >= wanted else (middle, high)
        left = wanted - self._sum(int((mine < high).sum()))
        left -= self._before(int((mine == high).sum()))  # of equal ones the first ranks' go first
        equal = mine == high
        zeroed = (mine < high) | (equal & (equal.cumsum(0) <= left))
        left_over = {
            f.name: some.masked_scatter(some, ~own)
            for f, some, own in zip(counted, ones, zeroed.split([len(c) for c in chosen]), strict=True)
        }
        for fragment in held:
            self._share(fragment, left_over.get(fragment.name))

    def of_fragment(self, fragment: Fragment) -> dict[str, Tensor]:
        """What a checkpoint holds of M: suffix of the parameter's name -> this rank's elements, float32."""
        return {TEXT_MASK: self.parts[fragment.name].mask.float()} if fragment.name in self.parts else {}

    def restore(self, read: dict[str, Tensor]) -> None:
        """M from what was read of a checkpoint for this rank's fragments, by name."""
        self.parts = {name: Part.of(self.parts[name].start, values.bool()) for name, values in read.items()}

    def _held(self) -> list[Fragment]:
        return [f for f in fragments(self._model, self._optimizer) if f.name in self._counts]

    def _is_cut(self, name: str) -> bool:
        mesh = self._groups.mesh
        return cut_for(self._cuts, name, mesh.tensor_rank, mesh.tensor) is not None

    def _counts_here(self, fragment: Fragment) -> bool:
        """Whether this rank stands for the fragment: over all ranks every element is counted once."""
        mesh = self._groups.mesh
        stands_for_tensor_ranks = self._is_cut(fragment.name) or mesh.tensor_rank == 0
        return stands_for_tensor_ranks and (self._zero_stage > 0 or mesh.data_rank == 0)

    def _share(self, fragment: Fragment, mask: Tensor | None) -> None:
        """M of a fragment, bool [n], from the rank that stands for it to all that hold it; None on the others."""
        own = torch.zeros(fragment.numel, dtype=torch.bool, device=self._groups.mesh.device) if mask is None else mask
        part = Part.of(fragment.start, own)
        if self._zero_stage == 0:
            dist.all_reduce(part.bits, group=self._groups.data)
        if not self._is_cut(fragment.name):
            dist.all_reduce(part.bits, group=self._groups.tensor)
        self.parts[fragment.name] = part

    def _sum(self, number: int) -> int:
        """Over all ranks."""
        total = torch.tensor(number, device=self._groups.mesh.device)
        dist.all_reduce(total)
        return int(total)

    def _before(self, number: int) -> int:
        """What the ranks before this one say, in all."""
        mesh = self._groups.mesh
        all_of_them = torch.zeros(mesh.world, dtype=torch.int64, device=mesh.device)
        all_of_them[mesh.rank] = number
        dist.all_reduce(all_of_them)
        return int(all_of_them[: mesh.rank].sum())
