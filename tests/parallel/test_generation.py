"""Captions written under ZeRO-3 and tensor parallelism are those of one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import initial_value, named_generator
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from beit3_dist.tasks.parts.generation import generate
from tests.parallel.training import MODELS, build, run_config
from tests.parallel.workers import run_workers
from tests.unit.test_generation import Words

WORDS = Words(mask=149, words=range(4, 140))
LONGEST = 8
PICTURES = 7
ENDING = {"paper": 3.0, "released": 2.0, "shallow": 0.0, "writer": 4.0}
"""How much likelier </s> is made."""


class Writer(nn.Module):
    """Stands where a task's objective does."""

    columns = 1

    def __init__(self, model: BEiT3) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, predict: Callable[[bool], bool]) -> list[list[int]]:
        return generate(self.model, images, WORDS, max_words=LONGEST, agree=predict)


def value(name: str, shape: torch.Size, architecture: str) -> Tensor:
    """Weights of ordinary size, and </s> likely enough that captions have different lengths."""
    draw = named_generator(1, name)
    value = initial_value(name, shape, MODELS[architecture], 0) + 0.15 * torch.randn(shape, generator=draw)
    if name == "text_head.bias":
        value[WORDS.eos] += ENDING[architecture]
    return value


def pictures() -> Tensor:
    return torch.randn(PICTURES, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def plain(architecture: str) -> list[list[int]]:
    model = BEiT3(MODELS[architecture], device="meta")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    model.load_state_dict({name: value(name, shape, architecture) for name, shape in shapes.items()}, assign=True)
    return generate(model, pictures(), WORDS, max_words=LONGEST)


def write(groups: Groups, architecture: str, zero_stage: int, tensor: int) -> list[list[int]]:
    """One rank's captions: of its share of the pictures, which are uneven over the replicas."""
    mesh = groups.mesh
    config = run_config(
        architecture, zero_stage=zero_stage, accumulation=1, data_parallel=mesh.data, tensor=tensor, steps=2
    )
    engine = Engine(
        config,
        groups,
        lambda: BEiT3(config.model, device="meta"),
        lambda name, shape: value(name, shape, architecture),
        objective=Writer,
        optimizer=lambda model, offload: build(model, offload, config, sgd=True),
    )

    def agree(done: bool) -> bool:
        everyone = torch.tensor(done, dtype=torch.int32)
        dist.all_reduce(everyone, dist.ReduceOp.MIN)
        return bool(everyone)

    mine = pictures()[mesh.data_rank :: mesh.data]
    first, again = engine.predict(mine, agree), engine.predict(mine, agree)
    assert first == again
    return first


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ENDING)
@pytest.mark.parametrize(("zero_stage", "tensor"), [(3, 1), (1, 2)], ids=["dp2-zero3", "tp2"])
def test_captions_of_two_ranks(architecture: str, zero_stage: int, tensor: int) -> None:
    expected = plain(architecture)
    assert len({len(words) for words in expected}) > 1, "all captions have the same length"
    ranks = run_workers(2, write, architecture, zero_stage, tensor, tensor=tensor)
    replicas = 2 // tensor
    for rank, captions in enumerate(ranks):
        replica = rank // tensor
        assert captions == expected[replica::replicas]
