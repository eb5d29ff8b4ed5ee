"""The same pair fused and alone in one micro-batch, over tensor ranks: hidden states and gradients of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beit3_dist.config import ModelConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.cut import cut_for, cuts_of
from beit3_dist.model.initialization import materialize
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.tensor import apply_tensor_parallelism
from beit3_dist.parallel.token_norms import TokenNorms
from tests.equality import assert_close, assert_tensors_close
from tests.micro_batches import encoded_one_by_one, fused_and_alone
from tests.parallel.workers import Workers
from tests.parity.test_one_pass import PAPER, RELEASED, objective_and_step


def gradients(model: BEiT3, hidden_TD: Tensor) -> dict[str, Tensor]:
    """Those of a model's parameters that take part."""
    hidden_TD.backward(torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(1)))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(groups: Groups, config: ModelConfig, sequence: bool) -> None:
    """For `run_workers`: this rank's slices against those of the whole model, kind by kind."""
    (inputs, kinds), whole = fused_and_alone(config), objective_and_step(config)[0].model
    rank, ranks, cuts, values = groups.mesh.tensor_rank, groups.mesh.tensor, cuts_of(whole), whole.state_dict()
    expected_TD = encoded_one_by_one(whole, kinds)
    expected = gradients(whole, expected_TD)
    model = BEiT3(config, device="meta")
    apply_tensor_parallelism(model, groups.tensor, sequence)

    def mine(name: str, tensor: Tensor) -> Tensor:
        cut = cut_for(cuts, name, rank, ranks)
        return tensor if cut is None else cut.of(tensor)

    materialize(model, lambda name, shape: mine(name, values[name]).clone(), "cpu")
    hidden_TD = model.norm(model.hidden(inputs), inputs.layout)
    assert_close(hidden_TD, expected_TD, "hidden states")
    own = gradients(model, hidden_TD)
    if sequence:
        TokenNorms(model.blocks, groups, zero_stage=0).add_up(optimizer=None)
    assert_tensors_close(own, {name: mine(name, g) for name, g in expected.items()})


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_hidden_states_and_gradients(sequence: bool) -> None:
    with Workers(2, tensor=2) as workers:
        for config in (PAPER, RELEASED):
            workers.run(compare, config, sequence)
