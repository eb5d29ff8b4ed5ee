"""Every layout against one plain process: losses, gradient norms, first gradients, weights; drop path on."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch

from beit3_dist.config import Recompute, RunConfig
from beit3_dist.parallel import pipeline as stages
from beit3_dist.parallel.mesh import Groups
from tests.equality import assert_close, assert_tensors_close
from tests.parallel.training import Trace, assemble, engine_run, plain_run, run_config
from tests.parallel.workers import KeptWorkers


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
    recompute: Recompute | tuple[Recompute, ...] = "none"
    """Of all pipeline ranks, or of each."""
    every: int = 1
    sgd: bool = False
    steps: int = 3
    """ZeRO-3 learns in the first what to fetch ahead in all others, and what is left behind shows in the second."""
    kernels: Literal["torch", "triton", "compiled"] = "torch"

    def config(self, precision: str = "fp32") -> RunConfig:
        """The run of this layout."""
        return run_config(
            self.model,
            zero_stage=self.zero_stage,
            accumulation=self.accumulation,
            data_parallel=self.data,
            clip_norm=self.clip_norm,
            activation_checkpointing=self.recompute if isinstance(self.recompute, str) else list(self.recompute),
            activation_checkpointing_every=self.every,
            tensor=self.tensor,
            sequence=self.sequence,
            pipeline=self.pipeline,
            chunks=self.chunks,
            steps=self.steps,
            sgd=self.sgd,
            precision=precision,
            kernels=self.kernels,
            layers=self.layers,
        )

    @property
    def layers(self) -> int | None:
        """Stages that are interleaved get two layers each, and one where they are eight."""
        return 8 if self.chunks > 1 else None

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Data, tensor and pipeline ranks."""
        return self.data, self.tensor, self.pipeline

    def run(self, workers: KeptWorkers, precision: str = "fp32", multiple: int | None = None) -> Trace:
        """What the run does. `multiple`: of which the captions' words are filled up to be one."""
        config = self.config(precision)
        of_mesh = workers.of(math.prod(self.mesh), self.tensor, self.pipeline)
        return assemble(of_mesh.run(engine_run, config, self.sgd, None, multiple), config)


LAYOUTS = {
    # Two replicas: every ZeRO stage with accumulation 1 and 4 over ten steps.
    "dp2-zero0": Layout(0, "paper", data=2, accumulation=1, steps=10),
    "dp2-zero0-clip": Layout(0, "released", data=2, clip_norm=0.5, steps=10),
    "dp2-zero1": Layout(1, "released", data=2, accumulation=1, steps=10),
    "dp2-zero1-clip": Layout(1, "paper", data=2, clip_norm=0.5, steps=10),
    "dp2-zero2-selective": Layout(2, "paper", data=2, accumulation=1, recompute="selective", steps=10),
    "dp2-zero2": Layout(2, "released", data=2, steps=10),
    "dp2-zero3-clip": Layout(3, "released", data=2, accumulation=1, clip_norm=0.5, steps=10),
    "dp2-zero3-full": Layout(3, "paper", data=2, recompute="full", steps=10),
    # Every other mesh: two cases that differ in all that they can differ in.
    "tp2-zero0-sequence-sgd": Layout(0, "released", tensor=2, sequence=True, clip_norm=0.5, sgd=True),
    "tp2-zero1-selective": Layout(1, "paper", tensor=2, recompute="selective"),
    "tp4-zero2-sequence": Layout(2, "paper", tensor=4, sequence=True),
    "tp4-zero3-full-clip": Layout(3, "released", tensor=4, recompute="full", clip_norm=0.5),
    "dp2tp2-zero2-sequence": Layout(2, "released", data=2, tensor=2, sequence=True),
    "dp2tp2-zero3-attention-clip": Layout(3, "paper", data=2, tensor=2, recompute="attention", clip_norm=0.5),
    "pp2-zero0-by-rank": Layout(0, "released", pipeline=2, recompute=("full", "none")),
    "pp2-zero3-interleaved-sgd": Layout(3, "paper", pipeline=2, chunks=2, clip_norm=0.5, sgd=True),
    "pp4-zero2-interleaved-clip": Layout(2, "paper", pipeline=4, chunks=2, clip_norm=0.5),
    "pp4-zero3-by-rank": Layout(3, "released", pipeline=4, recompute=("full", "selective", "attention", "none")),
    "dp2pp2-zero1-sgd": Layout(1, "released", data=2, pipeline=2, clip_norm=0.5, sgd=True),
    "dp2pp2-zero3-interleaved-every-third": Layout(3, "paper", data=2, pipeline=2, chunks=2, recompute="full", every=3),
    "tp2pp2-zero0-interleaved-clip": Layout(0, "paper", tensor=2, pipeline=2, chunks=2, clip_norm=0.5),
    "tp2pp2-zero3-sequence-every-second": Layout(
        3, "released", tensor=2, sequence=True, pipeline=2, recompute="selective", every=2
    ),
    "dp2tp2pp2-zero1-sequence-interleaved-clip": Layout(
        1, "released", data=2, tensor=2, sequence=True, pipeline=2, chunks=2, clip_norm=0.5
    ),
    "dp2tp2pp2-zero3-selective": Layout(3, "paper", data=2, tensor=2, pipeline=2, recompute="selective"),
}

TOWERS = {
    "tower-dp2-zero3": Layout(3, "tower", data=2, steps=2),
    "tower-tp2-zero2-sequence": Layout(2, "tower", tensor=2, sequence=True, steps=2),
    "tower-pp2-zero1-interleaved": Layout(1, "tower", pipeline=2, chunks=2, steps=2),
    "fusion-dp2-zero3": Layout(3, "fusion", data=2, steps=2),
    "fusion-tp2-zero2-full": Layout(2, "fusion", tensor=2, recompute="full", steps=2),
    "fusion-pp2-zero1": Layout(1, "fusion", pipeline=2, steps=2),
}

COMPILED = {
    "one-zero1-compiled": Layout(1, "shallow", accumulation=2, kernels="compiled"),
    "dp2-zero3-compiled": Layout(3, "shallow", data=2, accumulation=2, kernels="compiled"),
    "tp2-zero3-sequence-compiled": Layout(3, "shallow", tensor=2, sequence=True, accumulation=2, kernels="compiled"),
    "pp2-zero3-full-compiled": Layout(3, "shallow", pipeline=2, accumulation=2, recompute="full", kernels="compiled"),
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
            cases[name] = Layout(zero, model, data, tensor, sequence, pipeline, chunks, recompute=recompute)
    return cases


def pairs(layouts: Iterable[Layout]) -> set[tuple[str, Any, str, Any]]:
    """The pairs of choices that occur together in one of the layouts."""
    found = set()
    for layout in layouts:
        choices = {
            "mesh": layout.mesh,
            "ZeRO": layout.zero_stage,
            "model": layout.model,
            "recompute": layout.recompute != "none",
            "sequence": layout.sequence,
            "interleaved": layout.chunks > 1,
            "clipping": layout.clip_norm < 1,
        }
        for (one, a), (other, b) in itertools.combinations(choices.items(), 2):
            found.add((one, a, other, b))
    return found


def test_the_table_covers_all_pairs_but_meshes_with_zero_stages() -> None:
    """Nine meshes and four ZeRO stages are 36 pairs, which 24 cases cannot hold beside the rest: 20 of them occur, each
    stage on a mesh of each kind. The product has them all."""
    assert len(LAYOUTS) == 24
    meshes = {layout.mesh for layout in LAYOUTS.values()}
    possible = {
        Layout(zero, model, data, tensor, sequence, pipeline, chunks, recompute=recompute, clip_norm=clip_norm)
        for (data, tensor, pipeline), zero, model, recompute, clip_norm in itertools.product(
            meshes, range(4), ("paper", "released"), ("none", "full"), (3.0, 0.5)
        )
        for sequence, chunks in itertools.product((False, True)[:tensor], (1, 2)[:pipeline])
    }
    left_out = pairs(possible) - pairs(LAYOUTS.values())
    assert {(one, other) for one, _, other, _ in left_out} == {("mesh", "ZeRO")} and len(left_out) == 16
    for axis in range(3):
        assert {case.zero_stage for case in LAYOUTS.values() if case.mesh[axis] > 1} == {0, 1, 2, 3}


@functools.cache
def reference(model: str, layers: int | None, parts: int, clip_norm: float, sgd: bool, steps: int) -> Trace:
    torch.set_num_threads(1)
    config = run_config(
        model, layers=layers, zero_stage=3, accumulation=1, data_parallel=parts, clip_norm=clip_norm, sgd=sgd,
        steps=steps,
    )  # fmt: skip
    return plain_run(config, parts, sgd)


def compare(ours: Trace, layout: Layout) -> None:
    """Raises AssertionError where a run is not the plain one."""
    parts = layout.data * layout.accumulation
    plain = reference(layout.model, layout.layers, parts, layout.clip_norm, layout.sgd, layout.steps)
    if layout.clip_norm < 1:
        assert plain.grad_norms[0] > layout.clip_norm, "clipping is meant to be active in this case"
    assert all(torch.equal(ours.initial[name], weight) for name, weight in plain.initial.items())
    assert_close(torch.tensor(ours.grad_norms), torch.tensor(plain.grad_norms), "gradient norms")
    assert_close(torch.tensor(ours.losses), torch.tensor(plain.losses), "losses")
    if not layout.sgd:
        assert_tensors_close(ours.first_gradients, plain.first_gradients)
    assert_tensors_close(ours.weights, plain.weights)


@pytest.fixture(scope="module")
def workers() -> Iterator[KeptWorkers]:
    kept = KeptWorkers()
    yield kept
    kept.close()


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), *TOWERS.values()], ids=[*LAYOUTS, *TOWERS])
def test_layout_equals_one_process(layout: Layout, workers: KeptWorkers) -> None:
    compare(layout.run(workers), layout)


@pytest.mark.parametrize(
    "name", ["tp2-zero0-sequence-sgd", "pp2-zero3-interleaved-sgd", "tp2pp2-zero3-sequence-every-second"]
)
def test_captions_that_are_filled_up_change_no_layout(name: str, workers: KeptWorkers) -> None:
    layout = LAYOUTS[name]
    compare(layout.run(workers, multiple=13), layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", COMPILED.values(), ids=COMPILED.keys())
def test_compiled_blocks_equal_one_plain_process(layout: Layout, workers: KeptWorkers) -> None:
    compare(layout.run(workers), layout)


def run_with_torchs_buffers(groups: Groups, config: RunConfig, sgd: bool) -> dict[str, Any]:
    """For `KeptWorkers`: `engine_run` where stages keep the buffers that torch makes."""
    usual, stages._STAGE = stages._STAGE, stages._ZeroStage
    try:
        return engine_run(groups, config, sgd)
    finally:
        stages._STAGE = usual


@pytest.mark.parametrize("name", ["pp2-zero3-interleaved-sgd", "pp2-zero0-by-rank"])
def test_pipelines_with_the_buffers_of_old_torch(name: str, workers: KeptWorkers) -> None:
    """With torch 2.10 they have no others."""
    layout = LAYOUTS[name]
    config, of_mesh = layout.config(), workers.of(layout.pipeline, 1, layout.pipeline)
    compare(assemble(of_mesh.run(run_with_torchs_buffers, config, layout.sgd), config), layout)


@pytest.mark.product
@pytest.mark.parametrize("layout", everything().values(), ids=everything().keys())
def test_every_layout_equals_one_process(layout: Layout, workers: KeptWorkers) -> None:
    compare(layout.run(workers), layout)


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
def test_bf16_strays_from_fp32_no_more_than_twice_as_far_as_one_process_does(
    layout: Layout, workers: KeptWorkers
) -> None:
    fp32 = torch.tensor(reference("paper", None, 4, 3.0, False, layout.steps).losses)
    ours = (torch.tensor(layout.run(workers, "bf16").losses) - fp32).norm().item()
    alone = (torch.tensor(bf16_alone(layout.zero_stage, workers)) - fp32).norm().item()
    assert 0 < ours <= 2 * alone


@functools.cache
def bf16_alone(zero_stage: int, workers: KeptWorkers) -> list[list[float]]:
    """The losses of one process in bf16."""
    return Layout(zero_stage, "paper").run(workers, "bf16").losses
