"""What a step costs each rank does not grow with the ranks: counted in real processes, each with the same work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from beit3_dist.config import BatchConfig, CheckpointConfig, ModelConfig, ParallelConfig, RunConfig
from beit3_dist.kernels.layer_norm import LayerNorm
from beit3_dist.model import BEiT3
from beit3_dist.model.cut import dimensions_of
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.preemption import Together
from beit3_dist.run.preflight import prepare_run
from beit3_dist.train.feed import StepBatch
from beit3_dist.train.loop import train
from beit3_dist.train.pretraining import Pretraining
from tests.integration.runs import run_config
from tests.parallel.workers import run_workers
from tests.scale.counting import Costs, Count, counting
from tests.unit.tar_fixtures import sentences, text_tar

OPENED_BY_CHANCE = 8
"""Shards that a reader has, or has not, opened before."""
SHARDS = 16
"""Of the texts, which come from commands and have no random access. As many readers serve any number of ranks here."""
STEPS = 4
PLAIN, LAST = 3, 4
"""The third step, which nothing but training belongs to, and the last one, which saves."""


class Counted(Pretraining):
    """Pretraining whose costs are told step by step, what comes before the first one first."""

    count: Count
    costs: list[Costs]

    def next_batch(self, together: Together) -> StepBatch:
        self.costs.append(self.count.mark())
        return super().next_batch(together)


def counted_run(groups: Groups, config: RunConfig, folder: Path) -> list[Costs]:
    """For `run_workers`: the costs of a run, of its start and of each step."""
    with counting(folder) as count:
        job = Counted(prepare_run(config, groups.mesh))
        job.count, job.costs = count, []
        train(job)
        return [*job.costs, count.mark()]


def costs(folder: Path, replicas: int) -> list[list[Costs]]:
    """Rank by rank. Each replica has as many samples of each stream a step, whatever their number."""
    config = run_config(folder)
    config = replace(
        config,
        out=str(folder / f"run{replicas}"),
        steps=STEPS,
        data=replace(config.data, texts=f"pipe:cat {folder}/some-{{0..{SHARDS - 1}}}.tar", virtual_readers=SHARDS),
        batch=BatchConfig(images=4 * replicas, texts=8 * replicas, pairs=4 * replicas, accumulation=2),
        parallel=ParallelConfig(zero_stage=1),
        checkpoint=CheckpointConfig(every=STEPS),
    )
    return run_workers(replicas, counted_run, config, folder)


def table(replicas: int, everyones: list[list[Costs]]) -> None:
    for when, step in (("start", 0), ("step", PLAIN), ("saving step", LAST)):
        print(f"dp{replicas} {when:12s} first rank {everyones[0][step]}")
        print(f"dp{replicas} {when:12s}  last rank {everyones[-1][step]}")


def opened(step: Costs) -> int:
    """Without TensorBoard's file, which a thread of the first process opens for each of the records that it writes."""
    return sum(times for path, times in step.opens.items() if "/tensorboard/" not in path)


@pytest.mark.slow
def test_a_step_costs_each_of_more_replicas_the_same(tmp_path: Path) -> None:
    """Twice and four times the ranks, the same work for each: the same messages, none of them of Python objects."""
    compare(tmp_path, (2, 4, 8))


@pytest.mark.product
def test_sixteen_replicas(tmp_path: Path) -> None:
    """As many processes as a small machine holds; three minutes on two busy cores."""
    compare(tmp_path, (2, 16))


def compare(folder: Path, numbers: tuple[int, ...]) -> None:
    """Fails where a step costs a rank more among more replicas."""
    for number in range(SHARDS):
        text_tar(folder / f"some-{number}.tar", sentences()[10 * number : 10 * number + 10])
    found = {}
    for replicas in numbers:
        found[replicas] = costs(folder, replicas)
        table(replicas, found[replicas])
    for rank in (0, -1):
        few, *more = (everyones[rank][PLAIN] for everyones in found.values())
        assert few.calls and not few.objects and not few.looked
        for many in more:
            assert many.calls == few.calls and many.sent <= 1.02 * few.sent and not many.objects
            assert opened(many) <= opened(few) + OPENED_BY_CHANCE and not many.looked
        few, *more = (everyones[rank][LAST] for everyones in found.values())
        assert all(many.calls == few.calls for many in more)


def reductions(groups: Groups, config: RunConfig, folder: Path, models: list[tuple[int, int]]) -> list[Counter[int]]:
    """For `run_workers`: the all-reduces of a step by their bytes, of models of so many layers at so many micro-batches
    a step."""
    found = []
    for layers, accumulation in models:
        model, sizes = replace(config.model, layers=layers), replace(config.batch, accumulation=accumulation)
        run = replace(config, model=model, batch=sizes, out=f"{config.out}-{layers}-{accumulation}")
        messages = counted_run(groups, run, folder)[PLAIN].messages
        found.append(Counter({size: calls for (name, size), calls in messages.items() if name == "allreduce"}))
    return found


def norms_of(model: ModelConfig) -> Iterator[Tensor]:
    """The parameters of the blocks' norms that every tensor rank holds."""
    for module in BEiT3(model, device="meta").blocks.modules():
        if isinstance(module, LayerNorm) and not dimensions_of(module):
            yield from module.parameters()


def test_tensor_ranks_add_up_the_gradients_of_all_norms_at_once(tmp_path: Path) -> None:
    """One all-reduce a step, where there were two for each norm and micro-batch: 20 here of the deeper model."""
    parallel = ParallelConfig(zero_stage=1, tensor=2, sequence=True)
    config = replace(run_config(tmp_path), steps=STEPS, parallel=parallel)
    models = [(1, 1), (3, 1), (3, 2)]
    for shallow, deep, twice in run_workers(2, reductions, config, tmp_path, models, tensor=2):
        for (layers, accumulation), found in zip(models, (shallow, deep, twice), strict=True):
            print(f"tp2, {layers} layers, {accumulation} micro-batches: {found.total()} all-reduces of a step")
        assert shallow.total() == deep.total(), "it grows with the layers"
        of_norms = [4 * sum(p.numel() for p in norms_of(replace(config.model, layers=n))) for n, _ in models]
        assert [shallow[of_norms[0]], deep[of_norms[1]], twice[of_norms[2]]] == [1, 1, 1]


def buffers(groups: Groups, config: RunConfig, accumulations: list[int]) -> list[int]:
    """For `run_workers`: into how many buffers this process's stage receives, at so many micro-batches a step."""
    counts = []
    for number in accumulations:
        sizes = replace(config.batch, accumulation=number, images=2 * number, texts=2 * number, pairs=2 * number)
        job = Pretraining(prepare_run(replace(config, batch=sizes, out=f"{config.out}{number}"), groups.mesh))
        train(job)
        counts.append(job._engine._schedule._schedule._stage.buffers)  # type: ignore[union-attr]
    return counts


def test_a_pipelines_buffers_do_not_grow_with_accumulation(tmp_path: Path) -> None:
    config = replace(run_config(tmp_path), steps=3, parallel=ParallelConfig(zero_stage=1, pipeline=2))
    first, last = run_workers(2, buffers, config, [2, 6], pipeline=2)
    assert first == [1, 1], "gradients, one after the other"
    assert last == [1, 1], "activations, of which the last stage has one micro-batch under way"
