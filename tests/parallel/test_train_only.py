"""Runs that train only some parameters: the same in every layout, and what is frozen costs nothing and stays."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint.read import StoredShards, read_weights
from beit3_dist.config import CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.model.trained import trained_names
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.parallel.fragments import inner_optimizer
from beit3_dist.parallel.mesh import Groups
from tests.equality import assert_close, assert_tensors_close
from tests.integration.runs import metrics, reproducible, run_config, second_half, train_in_turn
from tests.parallel import training
from tests.parallel.training import Trace, assemble, plain_run
from tests.parallel.workers import KeptWorkers

TEXTS = ["!*.attention*", "!*.ffn.vision.*", "!vision_embedding.*", "!image_head.*"]
"""As VLMo's second stage: what texts alone train, and the vision-language experts."""
TOP = ["blocks.2.*", "blocks.3.*", "norm.*", "*_head.*", "blocks.1.ffn.vision.norm.*"]
"""Nothing below has a gradient."""
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"dp2-zero{zero}": {"data_parallel": 2, "zero_stage": zero} for zero in range(4)},
    "tp2-zero3-sequence": {"tensor": 2, "sequence": True, "zero_stage": 3, "data_parallel": 1, "accumulation": 2},
    "pp2-zero1": {"pipeline": 2, "zero_stage": 1, "data_parallel": 1, "accumulation": 2},
}


def config_of(train_only: list[str], model: str, precision: str = "fp32", **layout: Any) -> RunConfig:
    settings = {"accumulation": 1, "steps": 3, "clip_norm": 0.5, "precision": precision} | layout
    return replace(training.run_config(model, **settings), train_only=train_only)


@functools.cache
def reference(model: str, top: bool) -> Trace:
    torch.set_num_threads(1)
    return plain_run(config_of(TOP if top else TEXTS, model, zero_stage=3, data_parallel=2), parts=2)


@pytest.fixture(scope="module")
def workers() -> Iterator[KeptWorkers]:
    kept = KeptWorkers()
    yield kept
    kept.close()


def engine_run(groups: Groups, config: RunConfig) -> dict[str, Any]:
    """`training.engine_run`, and what the engine holds of gradients and moments."""
    record: dict[str, Any] = {}
    made = training.Engine

    class Watched(made):  # type: ignore[valid-type, misc]
        def train_step(self, *arguments: Any, **named: Any) -> Any:
            result = super().train_step(*arguments, **named)
            inner = inner_optimizer(self.optimizer)
            record["moments"] = sum(state["exp_avg"].numel() for state in inner.state.values())
            frozen = [p for p in self.model.parameters() if not p.requires_grad]
            record["no gradient"] = all(p.grad is None for p in frozen)
            return result

    training.Engine = Watched  # type: ignore[misc]
    try:
        return training.engine_run(groups, config) | record
    finally:
        training.Engine = made  # type: ignore[misc]


@pytest.mark.parametrize(("layout", "top", "model"), [
    ("dp2-zero0", False, "paper"), ("dp2-zero1", True, "released"), ("dp2-zero2", False, "paper"),
    ("dp2-zero3", True, "released"), ("dp2-zero3", False, "paper"), ("tp2-zero3-sequence", False, "paper"),
    ("pp2-zero1", False, "paper"),
])  # fmt: skip
def test_every_layout_is_one_process(layout: str, top: bool, model: str, workers: KeptWorkers) -> None:
    config = config_of(TOP if top else TEXTS, model, **LAYOUTS[layout])
    of_mesh = workers.of(2, config.parallel.tensor, config.parallel.pipeline)
    records = of_mesh.run(engine_run, config)
    ours, plain = assemble(records, config), reference(model, top)
    shapes = {name: p.shape for name, p in objectives_of(config).build().named_parameters()}
    trained = trained_names(shapes, config.train_only)
    assert_close(torch.tensor(ours.losses), torch.tensor(plain.losses), "losses")
    assert_close(torch.tensor(ours.grad_norms), torch.tensor(plain.grad_norms), "gradient norms")
    assert set(ours.first_gradients) == set(plain.first_gradients) == trained
    assert_tensors_close(ours.first_gradients, plain.first_gradients)
    assert_tensors_close(ours.weights, plain.weights)
    for name in shapes.keys() - trained:
        assert torch.equal(ours.weights[name], plain.initial[name]), name
    assert all(record["no gradient"] for record in records)
    if config.parallel.tensor == config.parallel.pipeline == 1:  # else ranks hold parts, or all of what is not cut
        elements = sum(shapes[name].numel() for name in trained) * (2 if config.parallel.zero_stage == 0 else 1)
        held = sum(record["moments"] for record in records)
        assert elements <= held < elements + 2 * len(trained) + 8  # shares are filled up


STEPS = 4


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_stage_of_a_run_and_the_next_one(tmp_path: Path, workers: KeptWorkers, zero_stage: int) -> None:
    """In bf16, whose working weights are rounded: checkpoints have the fp32 values all the same."""
    parallel = ParallelConfig(zero_stage=zero_stage)
    every = CheckpointConfig(every=STEPS // 2)
    whole = run_config(tmp_path, steps=STEPS, precision="bf16", parallel=parallel, checkpoint=every)
    first = replace(whole, out=str(tmp_path / "texts"), train_only=TEXTS)
    second = replace(whole, out=str(tmp_path / "all"), init_from=first.out, steps=3)
    workers.of(2, 1, 1).run(train_in_turn, [first, second_half(first), second])

    resumed = Path(f"{first.out}-resumed")
    assert reproducible(resumed) == reproducible(first.out)[STEPS // 2 :]
    ours, again = (read_weights(Path(out, f"checkpoints/step_{STEPS:07d}")) for out in (first.out, resumed))
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    objectives, trained = objectives_of(first), trained_names(ours, TEXTS)
    stored = StoredShards(Path(first.out, f"checkpoints/step_{STEPS:07d}"))
    for name, value in ours.items():
        assert stored.suffixes(name) == ({"", "/exp_avg", "/exp_avg_sq"} if name in trained else {""})
        assert torch.equal(value, objectives.first_value(name, value.shape, first.seed)) == (name not in trained), name
    assert StoredShards(Path(second.out, "checkpoints/step_0000003")).suffixes("image_head.weight") == {
        "", "/exp_avg", "/exp_avg_sq"
    }  # fmt: skip
    assert len(metrics(second.out)) == 3
    log = Path(first.out, "logs/rank00000.log").read_text()
    assert (
        f"train_only: {sum(ours[name].numel() for name in trained):,} of {sum(map(torch.numel, ours.values())):,}"
        in log
    )
