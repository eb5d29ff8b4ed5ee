"""ZeRO 0 to 3 on two ranks against one plain process: losses, norms, first gradients, weights; drop path on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from tests.equality import assert_close, assert_tensors_close
from tests.parallel.training import Trace, assemble, engine_run, plain_run, run_config
from tests.parallel.workers import run_workers


@dataclass(frozen=True)
class Layout:
    """A named case."""

    zero_stage: int
    accumulation: int
    model: str
    clip_norm: float = 3.0
    activation_checkpointing: str = "none"


LAYOUTS = {  # every ZeRO stage with accumulation 1 and 4 and both architectures; active clipping; recomputation
    "zero0": Layout(0, 1, "paper"),
    "zero0-accumulate4": Layout(0, 4, "released", clip_norm=0.5),
    "zero1": Layout(1, 1, "released"),
    "zero1-accumulate4": Layout(1, 4, "paper", clip_norm=0.5),
    "zero2": Layout(2, 1, "paper", activation_checkpointing="selective"),
    "zero2-accumulate4": Layout(2, 4, "released"),
    "zero3": Layout(3, 1, "released", clip_norm=0.5),
    "zero3-accumulate4": Layout(3, 4, "paper", activation_checkpointing="full"),
}


@functools.cache
def reference(model: str, parts: int, clip_norm: float) -> Trace:
    torch.set_num_threads(1)
    return plain_run(run_config(model, zero_stage=3, accumulation=1, data_parallel=parts, clip_norm=clip_norm), parts)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_two_ranks_equal_one_process(layout: Layout) -> None:
    config = run_config(
        layout.model,
        zero_stage=layout.zero_stage,
        accumulation=layout.accumulation,
        data_parallel=2,
        clip_norm=layout.clip_norm,
        activation_checkpointing=layout.activation_checkpointing,
    )
    ours = assemble(run_workers(2, engine_run, config), config)
    plain = reference(layout.model, 2 * layout.accumulation, layout.clip_norm)
    if layout.clip_norm < 1:
        assert plain.grad_norms[0] > layout.clip_norm, "clipping is meant to be active in this case"
    assert_tensors_close(ours.first_gradients, plain.first_gradients)
    assert_close(torch.tensor(ours.grad_norms), torch.tensor(plain.grad_norms), "gradient norms")
    assert_close(torch.tensor(ours.losses), torch.tensor(plain.losses), "losses")
    # Adam divides by the root of the second moment, which blows up the rounding of gradients that are nearly zero.
    assert_tensors_close(ours.weights, plain.weights, bound=1e-4)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bf16_strays_from_fp32_no_more_than_twice_as_far_as_one_process_does(zero_stage: int) -> None:
    fp32 = reference("paper", 2, 3.0)

    def deviation(world: int) -> float:
        config = run_config(
            "paper", zero_stage=zero_stage, accumulation=2 // world, data_parallel=world, precision="bf16"
        )
        ours = assemble(run_workers(world, engine_run, config), config)
        return (torch.tensor(ours.losses) - torch.tensor(fp32.losses)).norm().item()

    alone, together = deviation(1), deviation(2)
    assert 0 < together <= 2 * alone
