"""Distillation: what frozen teachers see in images, texts and pairs, as features or as distributions.

ViT-BERT (Li et al. 2021) has one teacher of images and one of texts; EVA (Fang et al. 2022) and MVP (Wei et al. 2022a)
recover a teacher's features where patches are masked; feature distillation (FD, Wei et al. 2022b) learns all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3_dist.config import RunConfig, require
from beit3_dist.data.batch import MicroBatch
from beit3_dist.data.order import Stream
from beit3_dist.data.views import SeenImages
from beit3_dist.kernels.linear import Linear
from beit3_dist.model.token_layout import to_device
from beit3_dist.objectives.base import Loss, Objective, Places
from beit3_dist.objectives.image_classification import ImageClassification
from beit3_dist.objectives.lessons import NAME, SECTION, SIDES, Lesson, LessonConfig, Opened, distance, normalised
from beit3_dist.objectives.masked_data_modeling import IMAGE, MaskedDataModeling
from beit3_dist.objectives.soft_targets import divergence
from beit3_dist.parallel.collectives import made_in_shares


@dataclass(kw_only=True)
class DistillationConfig:
    """Learning from frozen teachers, each stream from its own."""

    images: LessonConfig = field(default_factory=LessonConfig)
    """About images alone."""
    texts: LessonConfig = field(default_factory=LessonConfig)
    """About texts alone."""
    pairs: LessonConfig = field(default_factory=LessonConfig)
    """About images and captions together."""


class Distillation(Objective):
    """Up to four losses: of the patches (or classes) and words of each stream that has a teacher."""

    name = NAME
    Config = DistillationConfig

    def __init__(self, config: DistillationConfig, run: RunConfig) -> None:
        super().__init__(config, run)
        chosen = {s: getattr(config, s.field) for s in Stream if getattr(config, s.field).learns != "nothing"}
        require(bool(chosen), f"{SECTION} learns nothing: set learns and teacher of images, texts or pairs")
        self.lessons = {s: Lesson(s, lesson, run) for s, lesson in chosen.items() if s in self.streams}
        self._sides = [(x, side) for s, side in SIDES if (x := self.lessons.get(s)) is not None and side in x.sides]
        self.views = [lesson.view for lesson in self.lessons.values()]
        self.losses = [self._loss(lesson, side) for lesson, side in self._sides]
        self.teachers = {
            f"{lesson.name}.teacher.weights": lesson.config.teacher.weights
            for lesson in self.lessons.values()
            if lesson.config.teacher.weights
        }
        self._opened: Mapping[Stream, Opened] | None = None
        self._device: torch.device | None = None
        self._group: dist.ProcessGroup | None = None

    def _loss(self, lesson: Lesson, side: str) -> Loss:
        name = f"distilled_pair_{side}" if lesson.stream is Stream.PAIRS else f"distilled_{side}"
        unit = "image" if lesson.config.learns == "classes" else "patch" if side == IMAGE else "word"
        title = f"what the teacher of {lesson.stream.field} sees in their {side}s"
        stream = lesson.stream.field
        return Loss(name, lesson.config.weight, not lesson.of_features, title, unit, stream=stream)

    def meet(self, others: Mapping[str, Objective]) -> None:
        require(
            ImageClassification.name in others or not any(x.config.learns == "classes" for x in self.lessons.values()),
            f"{SECTION}.images.learns=classes by the head of objectives.image_classification: give that section, too",
        )

    def head(self) -> nn.Module | None:
        """Of each loss of features its own: D -> channels."""
        heads = {
            loss.name: Linear(self.model.width, lesson.config.channels)
            for loss, (lesson, _) in zip(self.losses, self._sides, strict=True)
            if lesson.of_features
        }
        return nn.ModuleDict(heads) if heads else None

    def open_teachers(self) -> dict[Stream, Opened]:
        return {stream: lesson.opened() for stream, lesson in self.lessons.items()}

    def use_teachers(self, opened: Any, device: torch.device | None, group: dist.ProcessGroup | None) -> None:
        self._opened, self._device, self._group = opened, device, group
        for teacher in opened.values() if device is not None else ():
            teacher.network.to(device)

    def target_flops(self, samples: Mapping[str, int]) -> float:
        assert self._opened is not None
        return sum(samples[stream.field] * teacher.flops for stream, teacher in self._opened.items())

    def counts(self, batch: MicroBatch) -> list[int]:
        return [int(own.sum()) for own in self.targets_by_sample(batch)]

    def targets_by_sample(self, batch: MicroBatch) -> list[Tensor]:
        return [
            torch.ones(len(batch.streams["images"]), dtype=torch.int64)
            if lesson.config.learns == "classes"
            else lesson.mask(side, batch).sum(1)
            for lesson, side in self._sides
        ]

    def rows(self, batch: MicroBatch, places: Places) -> Tensor:
        rows = []
        for lesson, side in self._sides:
            if lesson.config.learns == "classes":
                rows.append(places.first(lesson.view))
            else:
                of_side = places.patches if side == IMAGE else places.words
                rows.append(of_side(lesson.view, lesson.mask(side, batch)))
        return torch.cat(rows)

    def targets(
        self, batch: MicroBatch, places: Places, seen: SeenImages, move: Callable[[Tensor], Tensor]
    ) -> list[Tensor] | None:
        """Of each loss, float32: normalised features or hidden states of the teacher [m, channels], or logits. None
        where nobody has opened the teachers, as for a report."""
        if self._opened is None:
            return None
        taught, found = {s: self._taught(lesson, batch, seen, move) for s, lesson in self.lessons.items()}, []
        for lesson, side in self._sides:
            of_stream = taught[lesson.stream]
            if lesson.config.learns == "classes":
                found.append(of_stream)
                continue
            patches = self.model.patches * lesson.stream.has_images
            of_side = of_stream[:, :patches] if side == IMAGE else of_stream[:, patches:]
            learnt = move(lesson.mask(side, batch).flatten().nonzero().squeeze(1))
            chosen = of_side.flatten(0, 1).index_select(0, learnt)
            found.append(normalised(chosen) if lesson.of_features else chosen)
        return found

    def _taught(self, lesson: Lesson, batch: MicroBatch, seen: SeenImages, move: Callable[[Tensor], Tensor]) -> Tensor:
        """What the teacher says of a stream's samples, see `Lesson.ask`. Collective over the tensor ranks."""
        assert self._opened is not None and self._device is not None
        samples, device, teacher = batch.streams[lesson.stream.field], self._device, self._opened[lesson.stream].network
        images = seen.images[lesson.stream.field] if lesson.stream.has_images else None
        text = padding = hidden = None
        if lesson.stream.has_text and lesson.is_beit3:
            assert samples.text is not None and samples.lengths is not None
            text, padding = samples.text, torch.arange(samples.text.shape[1]) >= samples.lengths[:, None]
        if lesson.config.learns == "masked_logits":
            drawn = samples.annotations[MaskedDataModeling.name]
            text, hidden = drawn.get("text"), drawn.get("image_mask")

        def make(rows: Tensor) -> Tensor:
            pixels = None if images is None else images[to_device(rows, device)].float() / 255
            of_rows = (None if some is None else some[rows] for some in (text, hidden))
            words, masked = (None if some is None else move(some) for some in of_rows)
            of_padding = None if padding is None else padding[rows]
            with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
                return lesson.ask(teacher, pixels, words, of_padding, masked)

        with torch.no_grad():
            return made_in_shares(make, len(samples), self._group)

    def sums(self, model: Any, hidden_MD: Tensor, targets: list[Tensor]) -> Tensor:
        parts = hidden_MD.split([len(target) for target in targets])
        of_losses = zip(self.losses, self._sides, parts, targets, strict=True)
        of_targets = [self._of_targets(model, loss.name, *side, *both) for loss, side, *both in of_losses]
        self.each = [some.detach() for some in of_targets]
        return torch.stack([some.sum(1) for some in of_targets], dim=1)

    def _of_targets(
        self, model: Any, name: str, lesson: Lesson, side: str, hidden_mD: Tensor, target: Tensor
    ) -> Tensor:
        """[2, m]: the loss of each target, and whether it is predicted as the teacher does."""
        config = lesson.config
        norm = model.image_norm if side == IMAGE else model.text_norm
        if config.learns == "classes":
            logits = model.objective_heads[ImageClassification.name](norm(hidden_mD))
            return divergence(logits, lambda rows: target[rows], config.temperature)
        if not lesson.of_features:
            assert self._opened is not None
            head = self._opened[lesson.stream].network.model
            head = head.image_head if side == IMAGE else head.text_head
            logits = model.image_logits(hidden_mD) if side == IMAGE else model.text_logits(hidden_mD)
            return divergence(logits, lambda rows: head.logits(target[rows]), config.temperature)
        features = model.objective_heads[self.name][name](norm(hidden_mD)).float()
        apart = distance(features, target, config.compared)
        return torch.stack([apart, torch.zeros_like(apart)])

    def head_flops(self, counts: Sequence[float]) -> float:
        """The student's; those of a teacher and of its heads count as little as an image tokenizer's."""
        return sum(self.head_products(counts).values())

    def head_products(self, counts: Sequence[float]) -> dict[str, float]:
        products: dict[str, float] = {}
        for loss, side, n in zip(self.losses, self._sides, counts, strict=True):
            head = self._head(loss.name, *side)
            products[head] = products.get(head, 0.0) + 2 * self.model.width * n * self._outputs(*side)
        return products

    def _head(self, loss: str, lesson: Lesson, side: str) -> str:
        """How the names of the parameters begin that make the student's side of a loss."""
        if lesson.config.learns == "classes":
            return f"objective_heads.{ImageClassification.name}."
        if lesson.of_features:
            return f"objective_heads.{self.name}.{loss}."
        return "image_head." if side == IMAGE else "text_head."

    def _outputs(self, lesson: Lesson, side: str) -> int:
        """Of the head, for each token."""
        if lesson.config.learns == "classes":
            return lesson.run.objectives[ImageClassification.name].classes
        if lesson.of_features:
            return lesson.config.channels
        return self.model.visual_vocab_size if side == IMAGE else self.model.vocab_size

    def expected_counts(self, samples: dict[str, int], run: RunConfig) -> list[float]:
        return [samples[lesson.stream.field] * lesson.tokens(side) for lesson, side in self._sides]
