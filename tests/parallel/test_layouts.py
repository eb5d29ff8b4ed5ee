"""Every layout against one plain process: losses, gradient norms, first gradients, weights; drop path on."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch

from beit3_dist.config import RunConfig
from tests.equality import assert_close, assert_tensors_close
from tests.parallel.training import Trace, assemble, engine_run, plain_run, run_config
from tests.parallel.workers import run_workers


@dataclass(frozen=True)
class Layout:
    """A case: a model, a way to spread it over processes, and how it is trained."""

    zero_stage: int
    model: str
    data: int = 1
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    chunks: int = 1
    accumulation: int = 4
    clip_norm: float = 3.0
    activation_checkpointing: str = "none"
    sgd: bool = False
    steps: int = 5

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
            steps=self.steps,
            sgd=self.sgd,
            precision=precision,
        )

    def run(self, precision: str = "fp32") -> Trace:
        """What the run does."""
        config, world = self.config(precision), self.data * self.tensor * self.pipeline
        records = run_workers(world, engine_run, config, self.sgd, tensor=self.tensor, pipeline=self.pipeline)
        return assemble(records, config)


LAYOUTS = {
    # Two replicas: every ZeRO stage with accumulation 1 and 4 over ten steps.
    "dp2-zero0": Layout(0, "paper", data=2, accumulation=1, steps=10),
    "dp2-zero0-clip": Layout(0, "released", data=2, clip_norm=0.5, steps=10),
    "dp2-zero1": Layout(1, "released", data=2, accumulation=1, steps=10),
    "dp2-zero1-clip": Layout(1, "paper", data=2, clip_norm=0.5, steps=10),
    "dp2-zero2-selective": Layout(2, "paper", data=2, accumulation=1, activation_checkpointing="selective", steps=10),
    "dp2-zero2": Layout(2, "released", data=2, steps=10),
    "dp2-zero3-clip": Layout(3, "released", data=2, accumulation=1, clip_norm=0.5, steps=10),
    "dp2-zero3-full": Layout(3, "paper", data=2, activation_checkpointing="full", steps=10),
    # Tensor parallelism, with and without sharded tokens.
    "tp2-zero0-sgd": Layout(0, "released", tensor=2, clip_norm=0.5, sgd=True),
    "tp2-zero1-sequence-clip": Layout(1, "paper", tensor=2, sequence=True, clip_norm=0.5),
    "tp4-zero3-sequence-full": Layout(3, "released", tensor=4, sequence=True, activation_checkpointing="full"),
    "dp2tp2-zero2-selective": Layout(2, "released", data=2, tensor=2, activation_checkpointing="selective"),
    "dp2tp2-zero3-sequence-clip": Layout(3, "paper", data=2, tensor=2, sequence=True, clip_norm=0.5),
    # Pipelines, plain and interleaved.
    "pp2-zero0-clip": Layout(0, "paper", pipeline=2, clip_norm=0.5),
    "pp2-zero3-interleaved-sgd": Layout(3, "released", pipeline=2, chunks=2, clip_norm=0.5, sgd=True),
    "pp4-zero2-full": Layout(2, "released", pipeline=4, activation_checkpointing="full"),
    "pp4-zero3-clip": Layout(3, "paper", pipeline=4, clip_norm=0.5),
    "dp2pp2-zero1-sgd": Layout(1, "paper", data=2, pipeline=2, clip_norm=0.5, sgd=True),
    "dp2pp2-zero3-interleaved": Layout(3, "paper", data=2, pipeline=2, chunks=2),
    # All three together.
    "tp2pp2-zero0": Layout(0, "paper", tensor=2, pipeline=2),
    "tp2pp2-zero3-sequence": Layout(3, "released", tensor=2, sequence=True, pipeline=2),
    "dp2tp2pp2-zero1-sequence-interleaved": Layout(
        1, "released", data=2, tensor=2, sequence=True, pipeline=2, chunks=2
    ),
    "dp2tp2pp2-zero2-sequence": Layout(2, "paper", data=2, tensor=2, sequence=True, pipeline=2, clip_norm=0.5),
    "dp2tp2pp2-zero3-selective": Layout(3, "paper", data=2, tensor=2, pipeline=2, activation_checkpointing="selective"),
}


def everything() -> dict[str, Layout]:
    """The full product of meshes, ZeRO stages, models, recomputation, sharded tokens and interleaving."""
    meshes = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 2, 1), (2, 1, 2), (2, 2, 2)]
    cases = {}
    for (data, tensor, pipeline), zero, model, recompute in itertools.product(
        meshes, range(4), ("paper", "released"), ("none", "full")
    ):
        for sequence, chunks in itertools.product((False, True)[:tensor], (1, 2)[:pipeline]):
            name = f"dp{data}tp{tensor}pp{pipeline}-zero{zero}-{model}-{recompute}-sequence{sequence}-chunks{chunks}"
            cases[name] = Layout(
                zero, model, data, tensor, sequence, pipeline, chunks, activation_checkpointing=recompute
            )
    return cases


@functools.cache
def reference(model: str, parts: int, clip_norm: float, sgd: bool, steps: int) -> Trace:
    torch.set_num_threads(1)
    config = run_config(
        model, zero_stage=3, accumulation=1, data_parallel=parts, clip_norm=clip_norm, sgd=sgd, steps=steps
    )
    return plain_run(config, parts, sgd)


def compare(ours: Trace, layout: Layout) -> None:
    """Raises AssertionError where a run is not the plain one."""
    parts = layout.data * layout.accumulation
    plain = reference(layout.model, parts, layout.clip_norm, layout.sgd, layout.steps)
    if layout.clip_norm < 1:
        assert plain.grad_norms[0] > layout.clip_norm, "clipping is meant to be active in this case"
    assert all(torch.equal(ours.initial[name], weight) for name, weight in plain.initial.items())
    assert_close(torch.tensor(ours.grad_norms), torch.tensor(plain.grad_norms), "gradient norms")
    assert_close(torch.tensor(ours.losses), torch.tensor(plain.losses), "losses")
    if layout.sgd:
        assert_tensors_close(ours.weights, plain.weights)
    else:
        assert_tensors_close(ours.first_gradients, plain.first_gradients)
        # Adam divides by the root of the second moment, which blows up the rounding of gradients that are nearly zero.
        assert_tensors_close(ours.weights, plain.weights, bound=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_equals_one_process(layout: Layout) -> None:
    compare(layout.run(), layout)


@pytest.mark.product
@pytest.mark.parametrize("layout", everything().values(), ids=everything().keys())
def test_every_layout_equals_one_process(layout: Layout) -> None:
    compare(layout.run(), layout)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, "paper", data=2, accumulation=2),
        Layout(3, "paper", data=2, accumulation=2),
        Layout(3, "paper", tensor=2, sequence=True),
        Layout(3, "paper", pipeline=2),
    ],
    ids=["dp2-zero1", "dp2-zero3", "tp2-zero3-sequence", "pp2-zero3"],
)
def test_bf16_strays_from_fp32_no_more_than_twice_as_far_as_one_process_does(layout: Layout) -> None:
    fp32 = torch.tensor(reference("paper", 4, 3.0, False, 5).losses)
    ours = (torch.tensor(layout.run("bf16").losses) - fp32).norm().item()
    assert 0 < ours <= 2 * bf16_alone(layout.zero_stage)


@functools.cache
def bf16_alone(zero_stage: int) -> float:
    """How far one process in bf16 strays from fp32."""
    fp32 = torch.tensor(reference("paper", 4, 3.0, False, 5).losses)
    return (torch.tensor(Layout(zero_stage, "paper").run("bf16").losses) - fp32).norm().item()
