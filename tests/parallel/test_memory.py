"""The arithmetic of memory.py against the bytes of DeepSpeed's real tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_dist.config import RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import initial_value
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.flat_step import FlatBF16
from beit3_dist.parallel.memory import state_bytes
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.pipeline import plan_stages
from beit3_dist.train.optimizer import build_optimizer
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes
from tests.parallel.training import micro_batches, run_config
from tests.parallel.workers import run_workers

BUCKET = 20_000


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bytes_by_kind(engine: Engine) -> dict[str, int]:
    """Bytes of the tensors of each kind, each storage once; of empty placeholders nothing."""
    optimizer: Any = engine.optimizer
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    parameters: list[Any] = list(engine.model.parameters())
    sharded = hasattr(parameters[0], "ds_tensor")
    masters = [group["params"] for group in inner.param_groups]
    if sharded:
        masters = optimizer.fp32_partitioned_groups_flat
    elif engine.zero_stage == 0:
        masters = []
    kinds = {
        "working": [p.ds_tensor if sharded else p.data for p in parameters],
        "masters": masters,
        "moments": [[state["exp_avg"], state["exp_avg_sq"]] for state in inner.state.values() if state],
        "gradients": [
            [p.grad for p in parameters if p.grad is not None],
            [getattr(optimizer, name, []) for name in ("averaged_gradients", "fp32_groups_gradients_flat")],
            getattr(optimizer, "grad_partitions_flat_buffer", []),
        ],
        "bucket": [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()],
        "live": [p.data for p in parameters] if sharded else [],
    }
    return {
        kind: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(group)}.values())
        for kind, group in kinds.items()
    }


def measure(groups: Groups, configs: list[RunConfig]) -> list[dict[str, int]]:
    """For each run the most bytes of each kind after any backward of its second step: the moments exist then."""
    return [_measure(groups, config) for config in configs]


def _measure(groups: Groups, config: RunConfig) -> dict[str, int]:
    mesh = groups.mesh
    engine = Engine(
        config,
        groups,
        lambda: BEiT3(config.model, device="meta"),
        lambda name, shape: initial_value(name, shape, config.model, config.seed),
        plan=plan_stages(config, *objectives_of(config).largest(mesh.data)),
        objective=lambda model: PretrainingModule(model, objectives_of(config), config.seed),
        optimizer=lambda model, offload: build_optimizer(model, offload, config.optim),
    )
    most: dict[str, int] = {}
    backward = engine.deepspeed.backward

    def count_all() -> None:
        for kind, count in _bytes_by_kind(engine).items():
            most[kind] = max(most.get(kind, 0), count)

    def backward_and_count(*arguments: Any, **keywords: Any) -> None:
        backward(*arguments, **keywords)
        count_all()

    if isinstance(engine.optimizer, FlatBF16):  # releases the gradients when it has summed them up
        update = engine.optimizer.update_hp_grads

        def count_and_update() -> None:
            count_all()
            update()

        engine.optimizer.update_hp_grads = lambda clear_lp_grads: count_and_update()

    allreduce_bucket = engine.deepspeed.allreduce_bucket

    def reduce_and_count(bucket: list[Tensor], *arguments: Any, **keywords: Any) -> Tensor:
        sent = sum(t.numel() for t in bucket) * engine.deepspeed.communication_data_type.itemsize
        joined = sum(t.nbytes for t in bucket) * (len(bucket) > 1)
        copied = engine.deepspeed.communication_data_type != bucket[0].dtype
        most["engine_bucket"] = max(most.get("engine_bucket", 0), joined + sent * copied)
        return allreduce_bucket(bucket, *arguments, **keywords)

    engine.deepspeed.allreduce_bucket = reduce_and_count
    engine.deepspeed.backward = backward_and_count
    tokenize, parts = precomputed_codes(config.model), mesh.data * config.batch.accumulation
    for step in range(2):
        most.clear()
        mine = micro_batches(config.model, step, parts, range(mesh.data_rank, parts, mesh.data))
        counts = torch.tensor(host_totals(mine, objectives_of(config)).counts)
        groups.sum_over_data(counts)
        engine.train_step((objectives_of(config).prepare(b, mesh.device, tokenize) for b in mine), counts, step, 1e-3)
    return most


@pytest.mark.parametrize(
    ("tensor", "pipeline", "stages"),
    [
        pytest.param(
            1,
            1,
            [(1, "bf16"), (2, "bf16"), (3, "bf16"), (0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32")],
            marks=pytest.mark.slow,
        ),
        (2, 1, [(3, "bf16")]),
        (1, 2, [(3, "bf16")]),
    ],
    ids=["dp2", "dp2tp2", "dp2pp2"],
)
def test_arithmetic_is_what_the_tensors_hold(
    tensor: int, pipeline: int, stages: list[tuple[int, str]], tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": BUCKET}}))
    configs = []
    for zero_stage, precision in stages:
        config = run_config(
            "released",
            zero_stage=zero_stage,
            accumulation=2,
            data_parallel=2,
            precision=precision,
            tensor=tensor,
            pipeline=pipeline,
        )
        # About a million parameters in small pieces: padding, and a parameter across the border of two ranks, are
        # below 5 %.
        model = replace(config.model, layers=8, ffn_width=256)
        configs.append(replace(config, deepspeed_config=str(file), model=model))
    world = 2 * tensor * pipeline
    measured = run_workers(world, measure, configs, tensor=tensor, pipeline=pipeline)
    for number, config in enumerate(configs):
        records = state_bytes(config, world, BEiT3(config.model, device="meta"), objectives_of(config).largest)
        expected = {(r.pipeline_rank, r.tensor_rank): r for r in records}
        for rank, of_rank in enumerate(measured):
            real, record = of_rank[number], expected[rank // (2 * tensor), rank % tensor]
            assert ("engine_bucket" in real) == (
                config.parallel.zero_stage == 0 or (config.parallel.zero_stage, config.precision) == (1, "bf16")
            )
            print(f"ZeRO-{config.parallel.zero_stage} {config.precision} rank {rank}:", real, record)
            for kind in ("working", "gradients", "masters", "moments"):
                assert real[kind] == pytest.approx(getattr(record, kind), rel=0.05), kind
            if "engine_bucket" in real:  # as many whole parameters as a bucket takes
                assert 0.5 * record.bucket < real["engine_bucket"] <= record.bucket
            if config.parallel.zero_stage == 3:  # below it the bucket is gone after the backward pass
                assert real["bucket"] == record.bucket
                assert 0 < real["live"] <= 1.01 * record.live  # padding


def test_what_moves_to_the_cpu_is_not_guessed() -> None:
    config = replace(
        run_config("paper", zero_stage=3, accumulation=1, data_parallel=2, precision="bf16"),
        deepspeed_config=str(Path(__file__).parents[2] / "ds_configs" / "zero3_bf16_offload.json"),
    )
    with pytest.raises(ValueError, match="offload_optimizer"):
        state_bytes(config, 2, BEiT3(config.model, device="meta"), objectives_of(config).largest)


def test_layouts_that_do_not_divide_are_refused() -> None:
    config = run_config("paper", zero_stage=3, accumulation=1, data_parallel=2, tensor=2)
    with pytest.raises(ValueError, match="does not divide 3 processes"):
        state_bytes(config, 3, BEiT3(config.model, device="meta"), objectives_of(config).largest)
