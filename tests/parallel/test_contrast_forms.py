"""All forms of contrast over 1, 2 and 4 processes, in one and in several micro-batches, against open_clip's losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_dist.objectives.contrast import (
    Contrast,
    Vectors,
    contrast_step,
    sigmoid_contrast,
    softmax_contrast,
)
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.replicas import ALONE, Replicas
from tests.parallel.workers import run_workers

PAIRS, FEATURES, LENGTH = 8, 5, 4
FORMS: dict[str, Contrast] = {"softmax": softmax_contrast, "sigmoid": sigmoid_contrast, "unicl": softmax_contrast}
EQUAL = torch.tensor([[0, 10], [1, 11], [0, 12], [3, 13], [4, 11], [5, 15], [6, 16], [7, 16]])
"""Hashes of images and captions: 0 and 2 have one image, 1 and 4, and 6 and 7, one caption."""
Parameters = dict[str, Tensor]


def parameters() -> Parameters:
    """An encoder of either side, and the head's two numbers."""
    draw = torch.Generator().manual_seed(0)
    weights = {side: torch.randn(FEATURES, LENGTH, generator=draw, dtype=torch.float64) for side in ("images", "texts")}
    numbers = {"scale": torch.tensor([1.7], dtype=torch.float64), "bias": torch.tensor([-2.0], dtype=torch.float64)}
    return {name: value.requires_grad_() for name, value in (weights | numbers).items()}


def features() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(PAIRS, FEATURES, generator=draw, dtype=torch.float64) for _ in range(2))
    return images, texts


def encoded(own: Parameters, rows: Tensor, form: str) -> Vectors:
    images, texts = (
        normalize(side[rows] @ own[name], dim=1) for side, name in zip(features(), ("images", "texts"), strict=True)
    )
    bias, labels = own["bias"] if form == "sigmoid" else None, EQUAL[rows] if form == "unicl" else None
    return Vectors(images, texts, own["scale"].exp(), bias, labels)


def result(own: Parameters, sums: Tensor) -> dict[str, Any]:
    """Sum of the losses, hits, and gradients of the mean loss over all pairs."""
    (sums[0] / PAIRS).backward()
    gradients = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in own.items()}
    return {"loss": sums[0].item(), "hits": sums[1].item()} | gradients


def ours(groups: Groups | None, parts: int) -> dict[str, dict[str, Any]]:
    """This rank's, for each form, from its pairs in so many micro-batches."""
    replicas = ALONE if groups is None else Replicas(groups.data)
    mine = torch.arange(PAIRS).chunk(replicas.size)[replicas.rank]
    found = {}
    for form, contrast in FORMS.items():
        own = parameters()
        if parts == 1:
            sums = contrast(encoded(own, mine, form), replicas).sum(1)
        else:
            with torch.no_grad():
                looked = [encoded(own, rows, form) for rows in mine.chunk(parts)]
            kept = contrast_step(contrast, looked, replicas)
            again = zip(kept, mine.chunk(parts), strict=True)
            sums = torch.stack([one.sums_of(encoded(own, rows, form)) for one, rows in again]).sum(0)
        found[form] = result(own, sums)
    return found


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        tensors = [made] if isinstance(made, Tensor) else made if isinstance(made, tuple | list) else []
        self.elements = max([self.elements, *(t.numel() for t in tensors if isinstance(t, Tensor))])
        return made


def held(groups: Groups, pairs: int) -> dict[str, int]:
    """What this rank has at most in one tensor, of each form, of a step of so many pairs, forward and backward."""
    replicas = Replicas(groups.data)
    own, found = pairs // replicas.size, {}
    for form in ("softmax", "sigmoid"):
        sides = [torch.ones(own, 2, requires_grad=True) for _ in range(2)]
        numbers = torch.ones(1), torch.ones(1) if form == "sigmoid" else None
        with Largest() as largest:
            FORMS[form](Vectors(*sides, *numbers), replicas)[0].sum().backward()
        found[form] = largest.elements
    return found


@pytest.mark.slow
def test_memory_of_a_rank_is_bounded_as_ranks_grow() -> None:
    """A step's pairs N are shared out: similarities with all candidates are N^2 / W on each of W ranks, and those of
    the ring N^2 / W^2; what a rank has of all pairs is vectors alone."""
    pairs, length = 64, 2
    for world in (2, 4):
        for found in run_workers(world, held, pairs):
            assert found["softmax"] == pairs**2 // world > pairs * length
            assert found["sigmoid"] == (pairs // world) ** 2


def theirs(form: str) -> dict[str, Any]:
    """open_clip's in one process; UniCL's by its definition."""
    own = parameters()
    pairs = encoded(own, torch.arange(PAIRS), form)
    similarity = pairs.scale * pairs.images @ pairs.texts.T
    right = torch.eye(PAIRS, dtype=torch.bool)
    if form == "unicl":
        right = (EQUAL[:, None] == EQUAL).any(2)
        shares = right / right.sum(1, keepdim=True)
        loss = -(shares * (similarity.log_softmax(1) + similarity.log_softmax(0).T)).sum() / PAIRS / 2
    else:
        from open_clip.loss import ClipLoss, SigLipLoss

        if form == "sigmoid":
            loss = SigLipLoss()(pairs.images, pairs.texts, pairs.scale, pairs.bias)
        else:
            loss = ClipLoss()(pairs.images, pairs.texts, pairs.scale)
    hits = sum(right[torch.arange(PAIRS), s.argmax(1)].sum() for s in (similarity, similarity.T))
    return result(own, torch.stack([loss * PAIRS, torch.as_tensor(hits) / 2]))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_values_and_gradients(world: int, parts: int) -> None:
    pytest.importorskip("open_clip")
    ranks = [ours(None, parts)] if world == 1 else run_workers(world, ours, parts)
    for form in FORMS:
        expected = theirs(form)
        for name, value in expected.items():
            np.testing.assert_allclose(
                sum(rank[form][name] for rank in ranks), value, rtol=1e-9, atol=1e-12, err_msg=f"{form}, {name}"
            )


def test_pairs_that_all_differ_or_are_all_alike() -> None:
    """UniCL is the softmax where all labels differ; where all are alike every pair's targets are even."""
    pairs = encoded(parameters(), torch.arange(PAIRS), "softmax")
    differ = Vectors(pairs.images, pairs.texts, pairs.scale, labels=torch.arange(2 * PAIRS).view(-1, 2))
    torch.testing.assert_close(softmax_contrast(differ), softmax_contrast(pairs))
    alike = Vectors(pairs.images, pairs.texts, pairs.scale, labels=torch.zeros(PAIRS, 2, dtype=torch.int64))
    similarity = pairs.scale * pairs.images @ pairs.texts.T
    even = -(similarity.log_softmax(1).mean(1) + similarity.log_softmax(0).mean(0)) / 2
    torch.testing.assert_close(softmax_contrast(alike), torch.stack([even, torch.ones_like(even)]))
