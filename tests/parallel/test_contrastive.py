"""The contrastive loss over several processes is that of one process with all examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from beit3_dist.objectives.contrast import Vectors, softmax_contrast
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.replicas import ALONE, Replicas
from tests.parallel.workers import run_workers

EXAMPLES, WIDTH = 6, 5


def vectors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors of pictures and texts [EXAMPLES, WIDTH], not yet of length one, and the inverse temperature."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return images, texts, torch.tensor(7.0, dtype=torch.float64)


def loss_and_gradients(groups: Groups | None) -> dict[str, Any]:
    """This rank's part of the loss, and the gradients of its part of the vectors and of the temperature."""
    world, rank = (1, 0) if groups is None else (groups.mesh.data, groups.mesh.data_rank)
    images, texts, scale = vectors()
    mine = [x.chunk(world)[rank].clone().requires_grad_() for x in (images, texts)]
    scale.requires_grad_()
    unit = [normalize(x, dim=1) for x in mine]
    losses, hits = softmax_contrast(Vectors(*unit, scale), ALONE if groups is None else Replicas(groups.data))
    (losses.sum() / EXAMPLES).backward()
    gradients = [x.grad.numpy() for x in (*mine, scale) if x.grad is not None]
    return {"loss": losses.sum().item() / EXAMPLES, "hits": hits.sum().item(), "gradients": gradients}


def test_two_ranks_are_one_process() -> None:
    whole = loss_and_gradients(None)
    parts = run_workers(2, loss_and_gradients)
    np.testing.assert_allclose(sum(part["loss"] for part in parts), whole["loss"], rtol=1e-12)
    assert sum(part["hits"] for part in parts) == whole["hits"]
    for number, expected in enumerate(whole["gradients"]):
        got = [part["gradients"][number] for part in parts]
        joined = np.concatenate(got) if number < 2 else sum(got)  # the temperature is on every rank
        np.testing.assert_allclose(joined, expected, rtol=1e-10, atol=1e-14)


def test_one_process_computes_the_definition() -> None:
    images, texts, scale = vectors()
    images, texts = normalize(images, dim=1), normalize(texts, dim=1)
    similarity = scale * images @ texts.T
    expected = -(similarity.log_softmax(1).diagonal() + similarity.log_softmax(0).diagonal()) / 2
    losses, hits = softmax_contrast(Vectors(images, texts, scale))
    torch.testing.assert_close(losses, expected)
    rows, columns, own = similarity.argmax(1), similarity.argmax(0), torch.arange(EXAMPLES)
    torch.testing.assert_close(hits, ((rows == own).double() + (columns == own).double()) / 2)
