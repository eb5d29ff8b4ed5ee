"""The image tokenizer's training as a job of the training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.data.faults import Fault
from beit3_dist.data.loader import loader
from beit3_dist.data.order import Stream, hash_sum
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.image_tokenizer.drawing import mosaic, nearest_patches, sheet
from beit3_dist.image_tokenizer.engine import TokenizerEngine, TokenizerStep
from beit3_dist.image_tokenizer.files import save_vqkd
from beit3_dist.image_tokenizer.images import ImageBatch
from beit3_dist.image_tokenizer.quantizer import CodeUsage
from beit3_dist.model.token_layout import to_device
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.checkpointing import contribution, load_checkpoint
from beit3_dist.run.guards.copies import Held
from beit3_dist.run.preemption import Together
from beit3_dist.run.preflight_image_tokenizer import TokenizerReady
from beit3_dist.train.feed import StepBatch, timed
from beit3_dist.train.loop import Job, train
from beit3_dist.train.metrics import pace
from beit3_dist.train.target_watch import COLLAPSED
from beit3_dist.train.totals import Totals

log = logging.getLogger(__name__)

SHOWN = 8
"""Images in a row of TensorBoard's sheet."""


def train_image_tokenizer(ready: TokenizerReady) -> None:
    """A training run of the image tokenizer. Every checkpoint renews OUT/image_tokenizer.pth."""
    train(TokenizerTraining(ready))


class TokenizerTraining(Job[TokenizerConfig, TokenizerStep]):
    """See `loop.Job`."""

    def __init__(self, ready: TokenizerReady) -> None:
        super().__init__(ready)
        self._ready, self._collapsed = ready, False
        self.samples = {"images": self.config.batch}
        self.max_bad_fraction: float | None = self.config.data.max_bad_fraction

    def start(self, groups: Groups) -> None:
        config, data = self.config, self.config.data
        self._groups = groups
        self._engine = TokenizerEngine(config, groups, self._ready.teacher)
        steps, pin = range(self.state.step, config.steps), self.mesh.device.type == "cuda"
        self._batches = iter(loader(self._ready.train, steps, data.workers, data.prefetch, pin))

    def shards(self) -> Iterator[Shard]:
        return chain(contribution(self._engine), self._tables() if self.mesh.is_first else ())

    def copies(self) -> Iterator[Held]:
        named = chain(self._engine.model.named_parameters(), self._engine.model.named_buffers())
        return (Held(name, values, replicated=True, uncut=False) for name, values in named)

    def load(self, checkpoint: Path) -> None:
        load_checkpoint(checkpoint, self._engine, self.state)
        read.load(checkpoint, self._tables())

    def _tables(self) -> Iterator[Shard]:
        """The codebook, which no optimizer moves."""
        for name, table in self._engine.model.named_buffers():
            yield Shard(name, tuple(table.shape), 0, {"": table.view(-1)})

    def first_faults(self) -> list[Fault]:
        return self._ready.train.stream.faults

    def next_batch(self, together: Together) -> StepBatch:
        batch, waited_s = together(lambda: timed(lambda: next(self._batches)))
        return StepBatch.agreed(self._groups, [batch], self._totals(batch), waited_s)

    def _totals(self, batch: ImageBatch) -> Totals:
        count = len(batch.ids)
        places = torch.arange(count) + self.mesh.data_rank * count
        stream = torch.full_like(batch.ids, Stream.IMAGES)
        hash_terms = hash_sum(stream.numpy(), places.numpy(), batch.ids.numpy())
        # FLOPs are not counted: nobody knows those of the teacher.
        return Totals([], count * (1 + self.config.model.grid**2), 0, len(batch.faults), hash_terms)

    def train_step(self, batch: StepBatch, step: int, lr: float) -> TokenizerStep:
        images = to_device(batch.micro_batches[0].images, self.mesh.device)
        if step == 0:
            self._engine.start_codebook(images)
        result = self._engine.train_step(images, step, lr)
        self._newest = images, result.codes
        return result

    def record(self, batch: StepBatch, result: TokenizerStep, lr: float, step_s: float) -> dict[str, Any]:
        """`used_codes`: share of the codebook that the step's patches used."""
        usage = result.usage or CodeUsage(math.nan, math.nan)
        if not self._collapsed and usage.perplexity < math.exp(COLLAPSED):
            self._collapsed = True
            log.warning(
                "step %d: the codes have collapsed: nearly all patches have one (perplexity %.3f), which teaches "
                "nothing: lower optim.lr (now %g) or choose another teacher",
                self.state.step, usage.perplexity, self.config.optim.lr,
            )  # fmt: skip
        return {
            "step": self.state.step,
            "loss": result.loss,
            "loss_reconstruction": result.reconstruction,
            "loss_commitment": result.commitment,
            "used_codes": usage.share,
            "perplexity": usage.perplexity,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "images": self.config.batch,
            **pace(self.mesh, self.config.batch, batch, step_s),
        }

    def images(self) -> Mapping[str, Tensor]:
        step, every = self.state.step, self.config.pictures_every
        if not (self.mesh.is_first and every and (step % every == 0 or step == self.config.steps)):
            return {}
        images, codes = self._newest
        patches = nearest_patches(self._engine.model, [images])
        return {"codes": sheet([images[:SHOWN], mosaic(codes[:SHOWN], patches)])}

    def export(self) -> None:
        if self.mesh.is_first:
            save_vqkd(self._engine.model, Path(self.config.out) / "image_tokenizer.pth")
