"""Gradient masking: which stream's gradient each weight of the shared encoder takes (ViT-BERT, Li et al. 2021).

    G = M * g_text + (1 - M) * g_image,   M in {0, 1} for each weight, 1 at the start

After some steps a further share of all weights is set to 0, those with the smallest magnitudes of the texts'
gradients, until a given share is 0. The paper says neither how gradients are gathered for that nor whether the
threshold is one for all: here it is one, and magnitudes are those of AdamW's first moment, the running mean of what a
weight with M = 1 takes, the texts' gradient alone. So there is no second gradient to keep, and every replica and tensor
rank chooses among the moments that it holds.

M is applied to the gradient of every backward pass, of one stream at a time, before replicas add theirs up: a bit for
each weight of this rank's part of the model, on every replica.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.model.cut import cut_for
from beit3_dist.parallel.fragments import MOMENTS, Fragment, create_optimizer_state, fragments, optimizer_state
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


def is_shared(name: str) -> bool:
    """Whether both streams' tokens pass a parameter of this name."""
    return name.startswith("blocks.") and ".shared." in name


class GradientMasks:
    """M of this rank's part of the model."""

    def __init__(self, model: nn.Module, optimizer: Any, groups: Groups, cuts: dict[str, int], zero_stage: int) -> None:
        self._model, self._optimizer, self._groups, self._cuts = model, optimizer, groups, cuts
        self._zero_stage, self.takes_text = zero_stage, True
        """`takes_text`: whether the coming backward pass is of texts, else of images."""
        self._bits: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        parameters: Iterable[tuple[str, Any]] = model.named_parameters()
        for name, parameter in parameters:
            if is_shared(name) and parameter.requires_grad:
                count = getattr(parameter, "ds_numel", parameter.numel())
                self._counts[name] = count
                self._bits[name] = packed(torch.ones(count, dtype=torch.bool, device=groups.mesh.device))
                parameter.register_hook(partial(self._masked, name))

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        """Of the gradient of one stream what this parameter takes."""
        mask = self.mask(name).view_as(gradient)
        return gradient * (mask if self.takes_text else ~mask)

    def mask(self, name: str) -> Tensor:
        """M of this rank's part of a parameter, bool [n]."""
        return unpacked(self._bits[name], self._counts[name])

    def tighten(self, share: float) -> None:
        """Sets so many zeros that they are this share of all weights, behind those that are there. Collective."""
        create_optimizer_state(self._optimizer, held := self._held(), 0)
        counted = [f for f in held if self._counts_here(f)]
        device = self._groups.mesh.device
        ones = [self.mask(f.name)[f.start : f.start + f.numel] for f in counted]
        total = self._sum(sum(f.numel for f in counted))
        wanted = round(share * total) - (total - self._sum(sum(int(some.sum()) for some in ones)))
        if wanted <= 0:
            return
        # Of numbers that are not negative, the order is that of their bits as whole numbers.
        magnitudes = [optimizer_state(self._optimizer, f)[MOMENTS[0]].abs() for f in counted]
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
        parts = {}
        for fragment, some, own in zip(counted, ones, zeroed.split([len(c) for c in chosen]), strict=True):
            parts[fragment.name] = some.masked_scatter(some, ~own)
        self._spread(counted, parts)

    def of_fragment(self, fragment: Fragment) -> dict[str, Tensor]:
        """What a checkpoint holds of M: suffix of the parameter's name -> this rank's elements, float32."""
        if fragment.name not in self._bits:
            return {}
        own = self.mask(fragment.name)[fragment.start : fragment.start + fragment.numel]
        return {TEXT_MASK: own.float()}

    def restore(self, read: dict[str, Tensor]) -> None:
        """M from what was read of a checkpoint for this rank's fragments, by name. Collective."""
        held = [f for f in self._held() if self._counts_here(f)]
        self._spread(held, {f.name: read[f.name].bool() for f in held})

    def _held(self) -> list[Fragment]:
        return [f for f in fragments(self._model, self._optimizer) if f.name in self._bits]

    def _counts_here(self, fragment: Fragment) -> bool:
        """Whether this rank stands for the fragment: over all ranks every element is counted once."""
        mesh = self._groups.mesh
        is_cut = cut_for(self._cuts, fragment.name, mesh.tensor_rank, mesh.tensor) is not None
        return (is_cut or mesh.tensor_rank == 0) and (self._zero_stage > 0 or mesh.data_rank == 0)

    def _spread(self, held: list[Fragment], parts: dict[str, Tensor]) -> None:
        """M on all ranks from the parts, bool [n], of the fragments for which each stands."""
        mine, mesh = {f.name: f for f in held}, self._groups.mesh
        for name, count in self._counts.items():
            whole = torch.zeros(count, dtype=torch.uint8, device=mesh.device)
            if name in mine:
                whole[mine[name].start : mine[name].start + mine[name].numel] = parts[name].to(torch.uint8)
            dist.all_reduce(whole, group=self._groups.data)
            if cut_for(self._cuts, name, mesh.tensor_rank, mesh.tensor) is None:
                dist.all_reduce(whole, group=self._groups.tensor)
            self._bits[name] = packed(whole.bool())

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
