"""Fine-tuning as a job of the training loop: any downstream task."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice, starmap
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from beit3_dist.checkpoint.find import find
from beit3_dist.checkpoint.model_folder import save_model_folder
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.data.batch import mapped
from beit3_dist.data.loader import loader
from beit3_dist.data.order import hash_sum, mix
from beit3_dist.model.initialization import zeros
from beit3_dist.model.text_decoder import flops_of_reading, flops_per_word
from beit3_dist.model.token_layout import to_device
from beit3_dist.optimizers.registry import chosen
from beit3_dist.parallel.collectives import all_agree, all_gather
from beit3_dist.parallel.engine import Engine, StepResult
from beit3_dist.parallel.mesh import Groups, connect
from beit3_dist.parallel.replicas import Replicas
from beit3_dist.run.checkpointing import contribution, load_checkpoint, whole_checkpoint
from beit3_dist.run.guards.copies import Held
from beit3_dist.run.guards.watchdog import patience
from beit3_dist.run.preemption import Together, by_itself
from beit3_dist.run.preflight_finetuning import FinetuneReady
from beit3_dist.run.records import JsonLines
from beit3_dist.tasks.base import Normalization, TaskInputs, TaskObjective, told_places
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.tasks.data.batches import Draw, Examples, TaskBatch, training_places, validation_places
from beit3_dist.tasks.data.examples import Example
from beit3_dist.train.averages import WeightAverage
from beit3_dist.train.feed import StepBatch, timed
from beit3_dist.train.flops import encoder_flops
from beit3_dist.train.loop import Job, train
from beit3_dist.train.metrics import speed
from beit3_dist.train.optimizer import build_optimizer, layered_groups
from beit3_dist.train.totals import Totals

log = logging.getLogger(__name__)


def finetune(ready: FinetuneReady) -> None:
    """A fine-tuning run, or its validation alone. A run leaves the model for use in OUT/model."""
    job = FineTuning(ready)
    if job.config.evaluate_only:
        evaluate_only(job)
        return
    train(job)


def evaluate_only(job: FineTuning) -> None:
    """The validation of what the job starts from. Of a run in OUT only predictions and eval.jsonl change."""
    config = job.config
    groups = connect(job.mesh, patience(config.guards.step_timeout_s))
    job.checkpoint, job.state = whole_checkpoint(config, job.checkpoint, job.state)
    job.start_engine(groups)
    if job.checkpoint is not None:
        job.load(job.checkpoint)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    scores = job.evaluate()
    if scores:
        records = JsonLines(Path(config.out, "eval.jsonl"), None)
        records.write({"step": job.state.step} | scores)
        records.close()
        log.info("%s: %s", job.checkpoint or config.init_from, scores)


class FineTuning(Job[FinetuneConfig, StepResult]):
    """See `loop.Job`."""

    def __init__(self, ready: FinetuneReady) -> None:
        super().__init__(ready)
        self.task, self.samples = ready.task, {"examples": self.config.batch.size}
        self.max_bad_fraction: float | None = None
        self._ready, self._validation = ready, ready.validation
        self._views, self._mixing = ready.views, ready.mixing
        self._train_data = self._dataset(ready.train, train=True)

    def _dataset(self, examples: Sequence[Example], train: bool) -> Examples:
        config, data = self.config, self.config.data
        return Examples(
            examples,
            train=train,
            views=self._views,
            image_size=config.model.image_size,
            max_words=data.text_length,
            seed=config.seed,
            labels=partial(self.task.labels, classes=len(self.task.classes)),
            mixing=self._mixing if train else None,
            max_pixels=data.max_pixels,
        )

    @property
    def _consumed(self) -> int:
        """Training examples so far; checkpoints of former versions call them images."""
        return sum(self.state.consumed.values())

    def start(self, groups: Groups) -> None:
        self.start_engine(groups)
        batch, mesh = self.config.batch, self.mesh
        places = training_places(self._consumed, batch.size, batch.accumulation, mesh.data_rank, mesh.data)
        # Tensor ranks read the same examples, each for itself: fine-tuning data are small beside pretraining's.
        self._batches = iter(self._loader(self._train_data, places))

    def start_engine(self, groups: Groups) -> None:
        """The model in this rank's layout. Collective."""
        config, mesh, layers = self.config, self.mesh, self.config.model.layers
        self.task.connect(Replicas(groups.data))
        self._groups = groups
        self._normalize = Normalization(self.task.statistics, mesh.device)
        self._engine = Engine(
            config,
            groups,
            build=lambda: self.task.network(config.model, len(self.task.classes), config.dense, device="meta"),
            values=self._ready.values,
            objective=lambda model: TaskObjective(model, self.task, config.seed),
            optimizer=lambda model, offload: build_optimizer(
                model,
                offload,
                config.optim,
                layered_groups(
                    model,
                    config.optim.weight_decay,
                    layers,
                    config.layer_decay,
                    config.head_lr_scale,
                    chosen(config.optim),
                ),
            ),
            bounds=self.task.bounds(config.model),
        )
        self._engine.clocked_by(self.phases)
        self._ready.values = zeros  # what they were made of is not needed again
        self._average = WeightAverage(self._engine, config.ema_decay) if config.ema_decay else None
        self._more = self._average.of_fragment if self._average else None

    def shards(self) -> Iterator[Shard]:
        return contribution(self._engine, self._more)

    def copies(self) -> Iterator[Held]:
        return starmap(Held, self._engine.weights())

    def load(self, checkpoint: Path) -> None:
        load_checkpoint(checkpoint, self._engine, self.state, self._more)

    def _loader(self, data: Examples, places: Iterator[Any]) -> Any:
        pin = self.mesh.device.type == "cuda"
        return loader(data, places, self.config.data.workers, self.config.data.prefetch, pin)

    def next_batch(self, together: Together) -> StepBatch:
        batches, waited_s = together(lambda: timed(lambda: list(islice(self._batches, self.config.accumulation))))
        micro_batches = [self._masked(batch) for batch in batches]
        totals = Totals.summed((self._totals(batch) for batch in micro_batches), losses=1)
        return StepBatch.agreed(self._groups, micro_batches, totals, waited_s)

    def _masked(self, batch: TaskBatch) -> TaskBatch:
        keys = [mix(self.config.seed, Draw.MASK, place) for place in batch.places.tolist()]
        words, targets = self.task.mask(batch.words, batch.padding, keys)
        return replace(batch, words=words, targets=targets)

    def _totals(self, batch: TaskBatch) -> Totals:
        model, per_sample, none = self.config.model, batch.images.shape[1], torch.zeros(0, dtype=torch.int64)
        lengths = (~batch.padding).sum(1)
        masked = 0 if batch.targets is None else int((batch.targets >= 0).sum())
        count = len(batch.ids) if batch.targets is None else masked
        if per_sample == 0:
            samples = (0, none, lengths)
        elif lengths.sum() == 0:
            samples = (len(lengths) * per_sample, none, none)
        elif self.task.contrastive:
            samples = (len(lengths), lengths.repeat(self.task.matched), lengths)
        else:
            samples = (0, lengths.repeat(per_sample), none)
        flops = 3 * 2 * model.width * model.vocab_size * masked
        if batch.targets is not None and model.decoder_layers:  # which writes after the image and <s>, or a question
            written = (batch.targets >= 0).sum(1) + 1 if self.task.reads_text else lengths
            start = lengths - written if self.task.reads_text else torch.ones_like(lengths)
            samples = (0, start, none)
            flops += 3 * flops_per_word(model) * int(written.sum())
            flops += 3 * flops_of_reading(model, start + 1 + model.patches, written)
        flops += encoder_flops(model, *samples)
        tokens = len(lengths) * per_sample * (1 + model.patches) + int(lengths.sum()) * max(1, per_sample)
        hash_terms = hash_sum((batch.places - self._consumed).numpy(), batch.ids.numpy())
        return Totals([count], tokens, flops, len(batch.faults), hash_terms)

    def train_step(self, batch: StepBatch, step: int, lr: float) -> StepResult:
        result = self._engine.train_step(self._passes(batch.micro_batches, step), batch.step_counts, step, lr)
        if self._average and not result.skipped:
            self._average.update()
        return result

    def _passes(self, batches: list[TaskBatch], step: int) -> Iterator[tuple[TaskInputs]]:
        """A step's micro-batches, each prepared when it is asked for; a contrastive task has seen all of several before
        the first one. Collective."""
        looked: list[Any] = [None] * len(batches)
        if self.task.contrastive and len(batches) > 1:
            looked = self.task.looked(self._engine.look(((self._inputs(batch),) for batch in batches), step))
        return ((replace(self._inputs(batch), looked=own),) for batch, own in zip(batches, looked, strict=True))

    def _inputs(self, batch: TaskBatch) -> TaskInputs:
        move = lambda t: to_device(t, self.mesh.device)  # noqa: E731
        return TaskInputs(
            images=self._normalize(move(batch.images)),
            words=move(batch.words),
            padding=batch.padding,
            labels=mapped(batch.labels, Tensor, move),
            keys=move(batch.places),
            targets=None if batch.targets is None else move(batch.targets),
            told=None if batch.targets is None else move(told_places(batch.targets)),
        )

    def record(self, batch: StepBatch, result: StepResult, lr: float, step_s: float) -> dict[str, Any]:
        count = int(batch.step_counts[0])
        return {
            "step": self.state.step,
            "loss": result.losses[0] / max(count, 1),
            "acc": result.correct[0] / max(count, 1),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "examples": self.config.batch.size,
            **speed(self.config, self.mesh, self.config.batch.size, batch, step_s),
        }

    def evaluation_due(self) -> bool:
        step, every = self.state.step, self.config.eval.every
        return len(self._validation) > 0 and (step == self.config.steps or bool(every and step % every == 0))

    def evaluate(self, together: Together = by_itself) -> dict[str, float]:
        """The scores, on the first rank alone, as some metrics start programs; the others wait for it."""
        self.task.is_last = self.state.step == self.config.steps or self.config.evaluate_only
        with self._average.applied() if self._average else nullcontext():
            predict = partial(self._predictions, together)
            first = predict(self._validation)
            predictions = self.task.refined(first, self._validation, partial(predict, again=True))
        scores = self._scores(predictions) if self.mesh.is_first else {}
        if self.mesh.is_first:
            for name, image in self.task.shown()[0].items():  # for a page of the run
                path = Path(self.config.out, f"{name}.png")
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        dist.barrier()
        return scores

    def _scores(self, predictions: Any) -> dict[str, float]:
        """Of all predictions, which are written where no other step follows."""
        if self.task.is_last:
            folder = Path(self.config.out) / "predictions"
            folder.mkdir(exist_ok=True)
            self.task.write_predictions(folder, predictions, self._validation)
        scores = self.task.score(predictions, self._validation)
        if not scores:
            log.warning("data.validation: %s holds no truths, so that there is no score", self.config.data.validation)
        return scores

    def _predictions(self, together: Together, examples: Sequence[Example], again: bool = False) -> Tensor:
        """The task's predictions of all examples in their order, on the CPU of every rank. Collective. `again`: these
        are a second look's."""
        mesh, groups = self.mesh, self._groups
        count = self.config.eval.batch or self.config.micro_batch(mesh.data)[0]
        places = validation_places(len(examples), count, mesh.data_rank, mesh.data)
        parts: list[Tensor] = []
        seen = 0
        batches = iter(self._loader(self._dataset(examples, train=False), places))
        while (batch := together(lambda: next(batches, None))) is not None:
            mine = self._engine.predict(
                replace(self._inputs(batch), again=again), partial(all_agree, device=mesh.device)
            )
            some = all_gather(mine, groups.data).cpu()[: len(examples) - seen]
            seen += len(some)
            parts.append(some)
            if self.task.summed:
                parts = [torch.cat(parts).sum(0, keepdim=True)]
        return torch.cat(parts)

    def shown(self) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        return self.task.shown()

    def finish(self) -> None:
        """The last checkpoint's weights (their average, where there is one) as a folder for inference. Collective: the
        others stay until the first rank has written it, since srun may end what is left soon after the first end."""
        if self.mesh.is_first:
            self._write_model()
        dist.barrier()

    def _write_model(self) -> None:
        out = Path(self.config.out)
        checkpoint = find("auto", out / "checkpoints")
        assert checkpoint is not None, "the last step is always saved"
        shutil.rmtree(out / "model", ignore_errors=True)
        save_model_folder(
            out / "model",
            read_weights(checkpoint, averaged=True),
            self.config.model,
            task=self.task.describe(),
            text_tokenizer=Path(self.task.tokenizer.path),
        )
