"""Contrast of pairs beside the other objectives: their images and captions are encoded alone, in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from beit3_dist.config import RunConfig, require
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.order import Stream
from beit3_dist.data.streams import Sample
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.hashing import hash_bytes
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import Loss, Objective, Places, View
from beit3_dist.objectives.contrast import (
    Contrast,
    ContrastHead,
    Kept,
    Vectors,
    contrast_step,
    joined,
    sigmoid_contrast,
    softmax_contrast,
)
from beit3_dist.objectives.momentum_distillation import MomentumDistillation
from beit3_dist.objectives.pair_queue import PairQueue, TaughtPairs

NAME = "contrastive"
SECTION = f"objectives.{NAME}"


@dataclass(kw_only=True)
class ContrastiveConfig:
    """Image-text contrast of pairs. (BEiT-3 contrasts in a step of its own, after pretraining.)"""

    weight: float = 1.0
    """Weight of the loss."""
    form: Literal["softmax", "sigmoid", "unicl"] = "softmax"
    """softmax: CLIP's. sigmoid: SigLIP's, which needs no row of similarities as a whole. unicl: softmax in which pairs
    of equal images or equal captions are right for one another; else they are told apart like all others."""
    dim: int = 0
    """Length of the vectors; 0: the model's width, as in the released models."""
    negatives: Literal["step", "micro_batch"] = "step"
    """What a pair is told apart from, over all ranks. step: all pairs of the step; with batch.accumulation above 1 each
    micro-batch is encoded twice, first without gradient (GradCache). micro_batch: those of its micro-batch."""

    def __post_init__(self) -> None:
        require(self.weight > 0, f"{SECTION}.weight={self.weight} must be positive")
        require(self.dim >= 0, f"{SECTION}.dim={self.dim} is negative")


@dataclass(frozen=True)
class Targets:
    """What the vectors of a micro-batch's n pairs are compared by."""

    labels: Tensor | None
    """int64 [n, 2]: hashes of image and caption; None: each pair is right for itself alone."""
    places: Tensor | None = None
    """int64 [n]: of the pairs in the step, where a moving average teaches."""
    kept: Kept | None = None
    """The contrast of the step, where it is one of several micro-batches'."""
    taught: TaughtPairs | None = None
    """What the moving average says."""


FORMS: dict[str, Contrast] = {"softmax": softmax_contrast, "sigmoid": sigmoid_contrast, "unicl": softmax_contrast}


class Contrastive(Objective):
    """One loss: contrast of images alone with captions alone, by the vectors of CLS and <s>."""

    name = NAME
    Config = ContrastiveConfig
    compared: Vectors
    """This replica's pairs that were compared last: the step's where it looks ahead, else the micro-batch's."""

    def __init__(self, config: ContrastiveConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        self.views = [View("pairs", True, False), View("pairs", False, True)] if run.batch.pairs else []
        self.losses = [Loss(self.name, config.weight, title="images and captions alone", unit="pair", stream="pairs")]
        self.looks_back = MomentumDistillation.name in run.objectives
        require(
            not self.looks_back or (config.form, config.negatives) == ("softmax", "step"),
            f"objectives.{MomentumDistillation.name} needs {SECTION}.form=softmax and {SECTION}.negatives=step",
        )
        self.hashes_images = config.form == "unicl" or self.looks_back
        accumulation = run.batch.accumulation
        self.looks_ahead = config.negatives == "step" and accumulation > 1 and not self.looks_back
        require(
            not self.looks_ahead or run.parallel.pipeline == 1,
            f"{SECTION}.negatives=step: with batch.accumulation={accumulation} micro-batches are encoded twice, which "
            f"parallel.pipeline={run.parallel.pipeline} cannot: use {SECTION}.negatives=micro_batch",
        )
        self._candidates = run.batch.pairs // (1 if config.negatives == "step" else accumulation)
        head = self.head()
        self.constants, self.bounds = head.constants, head.bounds

    def meet(self, others: Mapping[str, Objective]) -> None:
        self._momentum: Any = others.get(MomentumDistillation.name)

    def use_teachers(self, opened: Any, device: torch.device | None, group: dist.ProcessGroup | None) -> None:
        if self.looks_back and device is not None:
            self._queue = PairQueue(self._momentum.config.queue, self.config.dim or self.model.width, device)

    def head(self) -> ContrastHead:
        with torch.device("meta"):
            return ContrastHead(self.model.width, self.config.dim, bias=self.config.form == "sigmoid")

    def annotate(
        self, stream: Stream, samples: Sequence[Sample], text: np.ndarray | None, tokenizer: TextTokenizer
    ) -> dict[str, Tensor]:
        """`labels` int64 [n, 2]: hashes of image and caption, where they are asked for."""
        return {"labels": hashes_of(samples)} if self.hashes_images and stream is Stream.PAIRS else {}

    def counts(self, batch: MicroBatch) -> list[int]:
        return [len(batch.streams["pairs"])]

    def targets_by_sample(self, batch: MicroBatch) -> list[Tensor]:
        return [torch.ones(len(batch.streams["pairs"]), dtype=torch.int64)]

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        return torch.cat([places.first(view) for view in self.views])

    def targets(self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> Targets:
        labels = batch.streams["pairs"].annotations.get(self.name, {}).get("labels")
        places_in_step = move(batch.streams["pairs"].positions) if self.looks_back else None
        return Targets(None if labels is None else move(labels), places_in_step)

    def vectors(self, model: BEiT3, hidden_MD: Tensor, targets: Targets) -> Vectors:
        """From what `sums` takes."""
        cls_ND, start_ND = hidden_MD.chunk(2)
        head = model.objective_heads[self.name]
        images, texts, scale, bias = head(model.image_norm(cls_ND), model.text_norm(start_ND))
        return Vectors(images, texts, scale, bias, targets.labels)

    def sums(self, model: BEiT3, hidden_MD: Tensor, targets: Targets) -> Tensor:
        vectors = self.vectors(model, hidden_MD, targets)
        if targets.kept is not None:
            self.each = [targets.kept.each]
            return targets.kept.sums_of(vectors)[:, None]
        self.compared = joined([vectors])
        if targets.taught is not None:
            alpha = targets.taught.alpha if model.training else 0.0
            of_pairs = targets.taught.contrast(vectors, alpha)
        else:
            of_pairs = FORMS[self.config.form](vectors, self.replicas)
        self.each = [of_pairs.detach()]
        return of_pairs.sum(1)[:, None]

    def look(self, model: BEiT3, hidden_MD: Tensor, targets: Targets) -> tuple[Vectors, Tensor | None]:
        return self.vectors(model, hidden_MD, targets), targets.places

    def looked(self, found: list[tuple[Vectors, Any]], step: int) -> list[dict[str, Any]]:
        vectors, places = zip(*found, strict=True)
        if self.looks_back:
            taught = self._queue.teach(vectors, places, self.replicas, self._momentum.alpha(step))
            return [{"taught": own} for own in taught]
        self.compared = joined(vectors)
        return [{"kept": own} for own in contrast_step(FORMS[self.config.form], vectors, self.replicas)]

    def with_looked(self, targets: Targets, own: dict[str, Any]) -> Targets:
        return replace(targets, **own)

    def after_step(self) -> None:
        if self.looks_back:
            self._queue.keep()

    def state(self) -> dict[str, Tensor]:
        """The queue of a moving average's pairs."""
        return {"queue": self._queue.rows} if self.looks_back and len(self._queue.rows) else {}

    def head_flops(self, counts: Sequence[float]) -> float:
        """Two projections of a pair, and its similarities: with all texts, and but for the sigmoid with all images.
        What a moving average has made has no gradient: two products where there are three else."""
        length = self.config.dim or self.model.width
        candidates = self._candidates * (1 if self.config.form == "sigmoid" else 2)
        if self.looks_back:
            candidates = (self._candidates + self._momentum.config.queue) * 2 * 2 / 3
        return counts[0] * 2 * length * (2 * self.model.width + candidates)

    def head_products(self, counts: Sequence[float]) -> dict[str, float]:
        length = self.config.dim or self.model.width
        return {f"objective_heads.{self.name}.": counts[0] * 4 * length * self.model.width}

    def expected_counts(self, samples: dict[str, int], run: RunConfig) -> list[float]:
        return [samples["pairs"]]


def hashes_of(pairs: Sequence[Sample]) -> Tensor:
    """int64 [n, 2]: hashes of each pair's image, as a file, and caption, as it is read."""
    hashes = [(sample.image_hash, hash_bytes(sample.words.tobytes())) for sample in pairs]
    return torch.tensor(hashes, dtype=torch.int64).view(-1, 2)
