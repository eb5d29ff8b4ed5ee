"""Cross-entropy of logits that become their gradient in place, and of a head together with its product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_dist.kernels.cross_entropy.definition import plain_cross_entropy, plain_head_cross_entropy
from beit3_dist.kernels.registry import Case, Function, Operation, Sizes, Version, register
from beit3_dist.kernels.triton import in_triton


def _targets(rows: Tensor, classes: int) -> Tensor:
    """Of each row, by what is in it: some of the rows alone have the targets that they have among all."""
    return (rows.detach()[:, 0].double().abs() * 1e4).long() % classes


def _losses(compute: Function, logits: Tensor) -> Sequence[Tensor]:
    targets = _targets(logits, logits.shape[1])
    some_right = torch.where(targets % 3 == 0, logits.detach().argmax(1), targets)
    return compute(logits * 1, some_right).unbind(0)  # a copy, which may be overwritten


def _cases(sizes: Sizes) -> list[Case]:
    return [Case([(sizes.masked, sizes.classes)], _losses)]


def _head_losses(compute: Function, hidden: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [compute(hidden, weight, bias, _targets(hidden, len(weight)))[0]]


def _head_cases(sizes: Sizes) -> list[Case]:
    shapes = [(sizes.masked, sizes.width), (sizes.classes, sizes.width), (sizes.classes,)]
    return [Case(shapes, _head_losses)]


_TRITON = f"{__name__}.triton"
_IN_PLACE = Version("torch", f"{__name__}.in_place", ("torch", "compiled"))
register(Operation("cross_entropy_in_place", plain_cross_entropy, _cases, [in_triton(_TRITON), _IN_PLACE]))
register(Operation("head_cross_entropy", plain_head_cross_entropy, _head_cases, [in_triton(_TRITON, 2)]))
