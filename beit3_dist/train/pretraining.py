"""Pretraining as a job of the training loop: any objectives on the mixed stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice, starmap
from pathlib import Path
from typing import Any

from torch import Tensor

from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.read import OBJECTIVE_STATE, TEACHER
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.config import STREAMS, RunConfig
from beit3_dist.data.batch import requests_from
from beit3_dist.data.faults import Fault
from beit3_dist.data.joining import micro_batches
from beit3_dist.data.streaming import furthest
from beit3_dist.image_tokenizer.codes import targets_of
from beit3_dist.image_tokenizer.files import give_values
from beit3_dist.image_tokenizer.targets import ImageTargets, target_flops
from beit3_dist.model.initialization import zeros
from beit3_dist.objectives.base import Loss
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine, StepResult
from beit3_dist.parallel.fragments import Fragment
from beit3_dist.parallel.mesh import Groups, Mesh
from beit3_dist.parallel.pipeline import plan_stages
from beit3_dist.parallel.replicas import Replicas
from beit3_dist.run.callbacks import Callback
from beit3_dist.run.checkpointing import More, contribution, load_checkpoint
from beit3_dist.run.folder import of_all
from beit3_dist.run.guards.copies import Held
from beit3_dist.run.preemption import Together
from beit3_dist.run.preflight import Ready
from beit3_dist.train.averages import WeightAverage
from beit3_dist.train.feed import Feed, StepBatch
from beit3_dist.train.loop import Job, train
from beit3_dist.train.masked_by_stream import MaskedByStream
from beit3_dist.train.metrics import losses_and_accuracies, speed
from beit3_dist.train.optimizer import pretraining_optimizer
from beit3_dist.train.passes import passes
from beit3_dist.train.pictures import Pictures, Shown
from beit3_dist.train.target_watch import TargetWatch
from beit3_dist.train.validation import evaluate
from beit3_dist.train.zero_shot import ZeroShot

log = logging.getLogger(__name__)


def pretrain(ready: Ready, called: Mapping[str, Callback] | None = None) -> None:
    train(Pretraining(ready), called)


def step_record(
    config: RunConfig,
    losses: list[Loss],
    mesh: Mesh,
    step: int,
    batch: StepBatch,
    result: StepResult,
    lr: float,
    step_s: float,
) -> dict[str, Any]:
    """The line of metrics.jsonl of a step that took `step_s` seconds."""
    sizes, counts = config.batch, batch.step_counts.tolist()
    return {
        "step": step,
        **losses_and_accuracies(losses, result.losses, result.correct, counts),
        "lr": lr,
        "grad_norm": result.grad_norm,
        "images": sizes.images,
        "texts": sizes.texts,
        "pairs": sizes.pairs,
        **speed(config, mesh, sizes.images + sizes.texts + sizes.pairs, batch, step_s),
    }


class Pretraining(Job[RunConfig, StepResult]):
    """See `loop.Job`."""

    def __init__(self, ready: Ready) -> None:
        super().__init__(ready)
        self._ready = ready
        self.samples = {stream: getattr(self.config.batch, stream) for stream in STREAMS}
        self.max_bad_fraction: float | None = self.config.data.max_bad_fraction

    def start(self, groups: Groups) -> None:
        config, mesh, ready = self.config, self.mesh, self._ready
        self._objectives = objectives = ready.objectives.connected(Replicas(groups.data))
        largest, flops = objectives.largest(mesh.data)
        if ready.image_tokenizer is not None:
            give_values(ready.image_tokenizer, mesh.device, mesh.is_last_stage)
        if ready.image_tokenizer is not None and ready.train_codes is None:
            sizes = dict(zip(STREAMS, config.micro_batch(mesh.data), strict=True))
            flops += target_flops(ready.image_tokenizer, sum(sizes[stream] for stream in objectives.coded))
        for objective in objectives:
            makes_targets = mesh.device if mesh.is_last_stage else None
            objective.use_teachers(ready.teachers[objective.name], makes_targets, groups.tensor)
            flops += objective.target_flops(dict(zip(STREAMS, config.micro_batch(mesh.data), strict=True)))
        self._engine = Engine(
            config,
            groups,
            build=objectives.build,
            values=ready.values,
            objective=lambda model: PretrainingModule(model, objectives, config.seed),
            optimizer=lambda model, offload: pretraining_optimizer(model, offload, config),
            plan=plan_stages(config, largest, flops),
            bounds=objectives.bounds,
            passes=2 if config.gradient_masking.every else 1,
        )
        self._engine.clocked_by(self.phases)
        ready.values = zeros  # what they were made of is not needed again
        self._masked = MaskedByStream(config, ready, self._engine) if config.gradient_masking.every else None
        if (trained := objectives.trained) is not None:
            sizes = {name: shape.numel() for name, shape in self._engine.whole_shapes.items()}
            trained_size = sum(sizes[name] for name in trained)
            log.info("train_only: %s of %s parameters train", f"{trained_size:,}", f"{sum(sizes.values()):,}")
        decay = objectives.average_decay
        self._teacher = WeightAverage(self._engine, decay, TEACHER) if decay else None
        if self._teacher is not None:
            self._teacher.begin()
        self._average = WeightAverage(self._engine, config.ema_decay) if config.ema_decay else None
        self._tokenize = None
        if ready.image_tokenizer is not None and mesh.is_last_stage:
            self._tokenize = ImageTargets(ready.image_tokenizer, mesh.device, groups.tensor, config.kernels)
        self._target_watch = TargetWatch(objectives, mesh)
        self._pictures: Pictures | None = None
        self._shown: Shown = {}, {}
        if config.eval.pictures:
            assert ready.image_tokenizer is not None and self._tokenize is not None
            self._pictures = Pictures(config, ready.image_tokenizer, self._tokenize, self._engine)
        self._feed = Feed(config, objectives, groups)
        images, texts, pairs = (self.state.consumed.get(stream, 0) for stream in self.samples)
        requests, data = requests_from((images, texts, pairs), config.batch), config.data
        ready.train.restore(self.state.readers, self.state.step > 0)
        self._data_ranks, self._read_up_to = groups.data, list[list[int]]()
        pin, reads = mesh.device.type == "cuda", self._feed.reads
        self._batches = micro_batches(ready.train, requests, data.workers, data.prefetch, pin) if reads else iter(())

    def shards(self) -> Iterator[Shard]:
        yield from contribution(self._engine, self._more(self._masked.masks.of_fragment if self._masked else None))
        if self.mesh.data_rank == self.mesh.tensor_rank == 0:
            yield from self._kept()

    def copies(self) -> Iterator[Held]:
        return starmap(Held, self._engine.weights())

    def load(self, checkpoint: Path) -> None:
        with self._masked.restored() if self._masked else nullcontext() as masks:
            load_checkpoint(checkpoint, self._engine, self.state, self._more(masks))
        read.load(checkpoint, self._kept())

    def _more(self, masks: More | None) -> More:
        """What the run keeps beside weights and moments; `masks`: of gradients, where it has some."""
        kept = [masks, *(average.of_fragment for average in (self._teacher, self._average) if average is not None)]

        def of_fragment(fragment: Fragment) -> dict[str, Tensor]:
            return {suffix: value for more in kept if more for suffix, value in more(fragment).items()}

        return of_fragment

    def _kept(self) -> Iterator[Shard]:
        """What the objectives keep from step to step."""
        for name, value in self._objectives.state().items():
            yield Shard(OBJECTIVE_STATE + name, value.shape, 0, {"": value.view(-1)})

    def first_faults(self) -> list[Fault]:
        return self._ready.train.faults()

    def next_batch(self, together: Together) -> StepBatch:
        batch = self._feed.step(lambda: list(islice(self._batches, self.config.accumulation)), together)
        rows = (row for b in batch.micro_batches for row in b.readers.tolist())
        self._read_up_to = furthest([*self._read_up_to, *rows])
        return batch

    def export(self) -> None:
        if self._ready.train.sequential:
            self.state.readers = furthest([*self.state.readers, *of_all(self._read_up_to, self._data_ranks)])

    def train_step(self, batch: StepBatch, step: int, lr: float) -> StepResult:
        result = self._engine.train_step(self._passes(batch, step), batch.step_counts, step, lr)
        if self._masked:
            self._masked.after(step + 1)
        if not result.skipped:
            self._objectives.after_step()
            for average in (self._teacher, self._average):
                if average is not None:
                    average.update()
        return result

    def _passes(self, batch: StepBatch, step: int) -> Iterator[tuple[Any, ...]]:
        watched = self._target_watch.is_due(self.state.step + 1)
        codes_of = partial(targets_of, codes=self._ready.train_codes, tokenize=self._tokenize)
        if self._masked:
            made = self._masked.passes(batch, codes_of)
        else:
            made = passes(self._objectives, self._engine, batch, codes_of, self._teacher, step)
        for inputs, reading, ids in made:
            if watched and reading is not None:
                self._target_watch.add(reading)
            yield inputs, reading, ids

    def record(self, batch: StepBatch, result: StepResult, lr: float, step_s: float) -> dict[str, Any]:
        losses = self._objectives.told
        record = step_record(self.config, losses, self.mesh, self.state.step, batch, result, lr, step_s)
        before = {stream: self.state.consumed[stream] - count for stream, count in self.samples.items()}
        record |= self._ready.train.samples_of_sets(before, self.config.batch)
        return record | self._target_watch.measure() if self._target_watch.is_due(self.state.step) else record

    def evaluation_due(self) -> bool:
        return self._ready.held_out is not None and self.state.step % self.config.eval.every == 0

    def evaluate(self, together: Together) -> dict[str, float]:
        with self._average.applied() if self._average is not None else nullcontext():
            return self._evaluate(together)

    def _evaluate(self, together: Together) -> dict[str, float]:
        engine, feed, ready = self._engine, self._feed, self._ready
        assert ready.held_out is not None
        made_by = ready.held_out_codes, self._tokenize, self._teacher
        scores = evaluate(self.config, self._objectives, engine, feed, ready.held_out, *made_by, together)
        if ready.zero_shot is not None:
            scores |= ZeroShot(self.config, ready.zero_shot, engine, ready.train.tokenizer, together).scores()
        if self._pictures is not None:
            self._shown = self._pictures.shown(together)
        return scores

    def shown(self) -> Shown:
        return self._shown
