"""What counts as waiting for the device, for the tests that count it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from beit3_dist.model import token_layout
from tests.device import ON_GPU
from tests.waits import waits

if ON_GPU:
    pytest.skip("torch counts by itself there", allow_module_level=True)


def counted(use: Callable[[Tensor], object], *, brought: bool = False) -> int:
    x = torch.arange(6.0)
    with waits([] if brought else [x]) as counter:
        use(token_layout.to_device(x, torch.device("cpu")) if brought else x)
    return Counter(counter).total()


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.sum().item(),
        lambda x: float((x * 2 + 1).max()),
        lambda x: bool(x[0] == 0),
        lambda x: (x > 2).nonzero(),
        lambda x: x[x > 2],
        lambda x: torch.ones(6).masked_select(x > 2),
        lambda x: torch.zeros(6).index_put_((x > 2,), torch.ones(())),
        lambda x: x.long().unique(),
        lambda x: torch.stack([x, x]).tolist(),
        lambda x: x.view(2, 3).t().cpu(),
        lambda x: x.detach().numpy(),
        lambda x: torch.zeros(6).copy_(x).add_(1).tolist(),
        lambda x: [torch._foreach_add_([y := torch.zeros(6)], [x]), y.tolist()],
        lambda x: torch.arange(6).repeat_interleave(x.long()),
        lambda x: torch.autograd.grad((w := torch.ones(6, requires_grad=True)).mul(x).sum(), w)[0].tolist(),
    ],
)
def test_waiting(use: Callable[[Tensor], object]) -> None:
    assert counted(use) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * 2,
        lambda x: x[torch.tensor([1, 2])],
        lambda x: x.sum().to("cpu", non_blocking=True).tolist(),
        lambda x: torch.arange(6).nonzero(),
        lambda x: torch.arange(6).tolist(),
        lambda x: torch.arange(2).repeat_interleave(x[:2].long() + 3, output_size=7),
    ],
)
def test_not_waiting(use: Callable[[Tensor], object]) -> None:
    assert counted(use) == 0


def test_what_is_brought_there_lies_there() -> None:
    assert counted(lambda x: x.sum().item(), brought=True) == 1
    assert counted(lambda x: x, brought=True) == 0
