"""Every layout against one plain process: losses, gradient norms, first gradients, weights; drop path on."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch

from beit3_dist.config import RunConfig
from tests.equality import assert_close, assert_tensors_close
from tests.parallel.training import Trace, assemble, engine_run, plain_run, run_config
from tests.parallel.workers import run_workers


@dataclass(frozen=True)
class Layout:
    """A named case."""

    zero_stage: int
    model: str
    data: int = 2
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    chunks: int = 1
    accumulation: int = 1
    clip_norm: float = 3.0
    activation_checkpointing: str = "none"

    def config(self, precision: str = "fp32") -> RunConfig:
        """The run of this layout."""
        return run_config(
            self.model,
            zero_stage=self.zero_stage,
            accumulation=self.accumulation,
            data_parallel=self.data,
            clip_norm=self.clip_norm,
            activation_checkpointing=self.activation_checkpointing,
            tensor=self.tensor,
            sequence=self.sequence,
            pipeline=self.pipeline,
            chunks=self.chunks,
            precision=precision,
        )

    def run(self, precision: str = "fp32") -> Trace:
        """What the run does."""
        config, world = self.config(precision), self.data * self.tensor * self.pipeline
        return assemble(run_workers(world, engine_run, config, tensor=self.tensor, pipeline=self.pipeline), config)


LAYOUTS = {
    # Every ZeRO stage with accumulation 1 and 4 and both architectures; active clipping; recomputation.
    "dp2-zero0": Layout(0, "paper"),
    "dp2-zero0-accumulate4": Layout(0, "released", accumulation=4, clip_norm=0.5),
    "dp2-zero1": Layout(1, "released"),
    "dp2-zero1-accumulate4": Layout(1, "paper", accumulation=4, clip_norm=0.5),
    "dp2-zero2-selective": Layout(2, "paper", activation_checkpointing="selective"),
    "dp2-zero2-accumulate4": Layout(2, "released", accumulation=4),
    "dp2-zero3": Layout(3, "released", clip_norm=0.5),
    "dp2-zero3-accumulate4-full": Layout(3, "paper", accumulation=4, activation_checkpointing="full"),
    # Tensor parallelism, with and without sharded tokens.
    "tp2-zero0": Layout(0, "released", data=1, tensor=2, clip_norm=0.5),
    "tp2-zero1-sequence": Layout(1, "paper", data=1, tensor=2, sequence=True, clip_norm=0.5),
    "tp4-zero3-sequence-full": Layout(3, "released", data=1, tensor=4, sequence=True, activation_checkpointing="full"),
    "dp2tp2-zero0-sequence": Layout(0, "paper", tensor=2, sequence=True, accumulation=4),
    "dp2tp2-zero2-selective": Layout(2, "released", tensor=2, activation_checkpointing="selective", clip_norm=0.5),
    "dp2tp2-zero3-sequence": Layout(3, "paper", tensor=2, sequence=True, clip_norm=0.5),
    "dp2tp2-zero3-accumulate4": Layout(3, "released", tensor=2, accumulation=4),
    # Pipelines, plain and interleaved.
    "pp2-zero0": Layout(0, "paper", data=1, pipeline=2, accumulation=4, clip_norm=0.5),
    "pp2-zero1": Layout(1, "released", data=1, pipeline=2, accumulation=4),
    "pp4-zero3": Layout(3, "paper", data=1, pipeline=4, accumulation=4, clip_norm=0.5),
    "pp4-zero2-full": Layout(2, "released", data=1, pipeline=4, accumulation=4, activation_checkpointing="full"),
    "pp2-zero3-interleaved": Layout(3, "released", data=1, pipeline=2, chunks=2, accumulation=4, clip_norm=0.5),
    "dp2pp2-zero3-interleaved": Layout(3, "paper", pipeline=2, chunks=2, accumulation=4),
    "dp2pp2-zero1": Layout(1, "paper", pipeline=2, accumulation=4, clip_norm=0.5),
    "tp2pp2-zero3-sequence": Layout(3, "released", data=1, tensor=2, sequence=True, pipeline=2, accumulation=4),
    "tp2pp2-zero0": Layout(0, "paper", data=1, tensor=2, pipeline=2, accumulation=4, clip_norm=0.5),
    "dp2tp2pp2-zero3": Layout(
        3, "paper", tensor=2, pipeline=2, accumulation=4, clip_norm=0.5, activation_checkpointing="selective"
    ),
    "dp2tp2pp2-zero1-sequence-interleaved": Layout(
        1, "released", tensor=2, sequence=True, pipeline=2, chunks=2, accumulation=4
    ),
}


@functools.cache
def reference(model: str, parts: int, clip_norm: float) -> Trace:
    torch.set_num_threads(1)
    return plain_run(run_config(model, zero_stage=3, accumulation=1, data_parallel=parts, clip_norm=clip_norm), parts)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_equals_one_process(layout: Layout) -> None:
    ours, plain = layout.run(), reference(layout.model, layout.data * layout.accumulation, layout.clip_norm)
    if layout.clip_norm < 1:
        assert plain.grad_norms[0] > layout.clip_norm, "clipping is meant to be active in this case"
    assert_tensors_close(ours.first_gradients, plain.first_gradients)
    assert_close(torch.tensor(ours.grad_norms), torch.tensor(plain.grad_norms), "gradient norms")
    assert_close(torch.tensor(ours.losses), torch.tensor(plain.losses), "losses")
    # Adam divides by the root of the second moment, which blows up the rounding of gradients that are nearly zero.
    assert_tensors_close(ours.weights, plain.weights, bound=1e-4)


@pytest.mark.parametrize(
    "layout",
    [Layout(1, "paper"), Layout(3, "paper"), Layout(3, "paper", data=1, accumulation=2, tensor=2, sequence=True)],
    ids=["dp2-zero1", "dp2-zero3", "tp2-zero3-sequence"],
)
def test_bf16_strays_from_fp32_no_more_than_twice_as_far_as_one_process_does(layout: Layout) -> None:
    fp32 = torch.tensor(reference("paper", 2, 3.0).losses)
    alone = replace(layout, data=1, tensor=1, sequence=False, accumulation=2)
    ours, one = ((torch.tensor(case.run("bf16").losses) - fp32).norm().item() for case in (layout, alone))
    assert 0 < ours <= 2 * one
