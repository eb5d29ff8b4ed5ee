"""A class for every pixel of an image, as in ADE20K."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from beit3_dist.config import ModelConfig
from beit3_dist.hashing import hash64, hash64_tensor, right_shift, signed
from beit3_dist.model.adapter import Adapter
from beit3_dist.model.deformable import starts_at_zero
from beit3_dist.model.pyramid import LayerPyramid, Pyramid, SimplePyramid, Windows
from beit3_dist.tasks.base import Task, TaskInputs
from beit3_dist.tasks.config import DenseConfig
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.data.masked_views import OUTSIDE, MaskedViews, scaled_size, stacked_labels
from beit3_dist.tasks.data.masks import NOTHING, read_masked
from beit3_dist.tasks.parts.drawing import painted
from beit3_dist.tasks.parts.heads import FineTuned, TaskHead
from beit3_dist.tasks.parts.mask2former import Mask2Former, Predictions, image_loss, scores_of
from beit3_dist.tasks.parts.metrics import overlaps
from beit3_dist.tasks.parts.submissions import write_csv, write_numbers
from beit3_dist.tasks.parts.upernet import DROPPED, UPerNet, convolution, resized_to
from beit3_dist.tasks.registry import register

OF_AUXILIARY = 0.4
"""Weight of the loss of the third map's own classifier."""

Size = tuple[int, int]
"""Height and width."""


def pyramid_of(config: ModelConfig, dense: DenseConfig) -> Pyramid:
    """What `dense.pyramid` says."""
    windows = Windows(dense.window, dense.global_blocks)
    match dense.pyramid:
        case "adapter":
            return Adapter(config, windows)
        case "layers":
            return LayerPyramid(config, windows)
    return SimplePyramid(config, dense.channels, windows)


class SegmentationHead(TaskHead):
    """Four maps, and UPerNet with an auxiliary classifier of the third map, or Mask2Former."""

    begins_with_norm = True
    small = ("classifier.weight", "auxiliary.1.weight")

    def __init__(self, config: ModelConfig, classes: int, dense: DenseConfig) -> None:
        super().__init__()
        self.pyramid, width = pyramid_of(config, dense), dense.channels
        if dense.head == "upernet":
            self.decoder: nn.Module = UPerNet(self.pyramid.channels, width)
            self.classifier = nn.Conv2d(width, classes, 1)
            self.auxiliary = nn.Sequential(convolution(self.pyramid.channels, width, 3), nn.Conv2d(width, classes, 1))
        else:
            self.decoder = Mask2Former(self.pyramid.channels, width, dense.queries, classes)
            self.deviations = {"decoder.queries.first": 1.0, "decoder.queries.own": 1.0}
        constants = {f"pyramid.{name}": value for name, value in self.pyramid.constants.items()}
        self.constants = constants | starts_at_zero(self)


def kept_channels(keys: Tensor, channels: int, *, seed: int, step: int) -> Tensor:
    """Factors of a training image's channels, float32 [B, channels, 1, 1]: 0 for a share of them, by a hash of (seed,
    step, sample, channel), so that every layout and a resumed run draw alike. `keys`: int64 [B]."""
    key = signed(hash64(hash64(seed) ^ step))
    bits = hash64_tensor(hash64_tensor(keys ^ key)[:, None] ^ torch.arange(channels, device=keys.device))
    uniform = right_shift(bits, 40).float() / (1 << 24)
    return ((uniform >= DROPPED).float() / (1 - DROPPED))[..., None, None]


@register("segmentation")
class Segmentation(Task):
    is_dense = needs_names = keeps_names = summed = True
    one_prediction = "image_path"
    serves: ClassVar[tuple[str, ...]] = ("segment",)
    read = staticmethod(read_masked)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._validation: Sequence[Example] = ()
        self._pictures: dict[str, Tensor] = {}

    # The examples.

    def examples(self, train: bool) -> Sequence[Example]:
        found = super().examples(train)
        if not train:
            self._validation = found
        return found

    @staticmethod
    def files(example: Example) -> tuple[Any, ...]:
        return (*example.images, *([example.label.path] if example.label.path else []))

    @staticmethod
    def labels(examples: Sequence[Example], classes: int) -> Tensor:
        """int16 [B, H, W]: see `data.masks`."""
        return stacked_labels(examples)

    def views(self) -> MaskedViews:
        data = self.config.data
        least, most = data.scales
        return MaskedViews(
            horizontal_flip=data.horizontal_flip,
            classes=len(self.classes),
            scales=(least, most),
            photometric=data.photometric,
        )

    # The model.

    @classmethod
    def head(cls, config: ModelConfig, classes: int, dense: DenseConfig | None = None) -> TaskHead:
        return SegmentationHead(config, classes, dense or DenseConfig())

    def _maps(self, model: FineTuned, inputs: TaskInputs) -> list[Tensor]:
        head: Any = model.task_head
        return head.pyramid.maps(model, inputs.images[:, 0], inputs.keep(inputs.keys))

    def losses(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """A row for each image: its loss, and the share of its pixels that are told right."""
        head: Any = model.task_head
        labels = inputs.labels.long().clamp(min=NOTHING)
        if self.config.dense.head == "mask2former":
            drawn_by = hash64(hash64(self.config.seed) ^ inputs.step) >> 1
            predictions: Predictions = head.decoder(self._maps(model, inputs))
            losses = [
                image_loss(predictions, image, labels[image], inputs.keys[image] ^ drawn_by)
                for image in range(len(labels))
            ]
            return torch.stack([torch.stack(losses), self._right(scores_of(predictions), labels)])
        maps = self._maps(model, inputs)
        features = head.decoder(maps)
        if model.training:
            keep = kept_channels(inputs.keys, features.shape[1], seed=self.config.seed, step=inputs.step)
            features = features * keep.to(features.dtype)
        logits = head.classifier(features)
        of_pixels = self._cross_entropy(logits, labels) + OF_AUXILIARY * self._cross_entropy(
            head.auxiliary(maps[2]), labels
        )
        return torch.stack([of_pixels, self._right(logits, labels)])

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B]: means over all pixels, of which those that count for nothing have no loss (mmsegmentation)."""
        whole = self._as_large(logits, labels)
        losses = nn.functional.cross_entropy(whole, labels, ignore_index=NOTHING, reduction="none")
        return losses.flatten(1).mean(1)

    def _as_large(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The finest maps, or others, of the padded images for the images as they are, in fp32: [B, C, H, W]."""
        coarsest = self.config.model.patch_size * 2
        height, width = labels.shape[1:]
        whole = resized_to(logits.float(), (height + -height % coarsest, width + -width % coarsest))
        return whole[..., :height, :width]

    @torch.no_grad()
    def _right(self, scores: Tensor, labels: Tensor) -> Tensor:
        known = labels != NOTHING
        right = (self._as_large(scores, labels).argmax(1) == labels) & known
        return right.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)

    # Its use.

    def scores(self, model: FineTuned, images: Tensor) -> Tensor:
        """How much speaks for each class, [B, classes, H, W] in fp32, of images [B, 3, H, W]."""
        head: Any = model.task_head
        decoded = head.decoder(head.pyramid.maps(model, images))
        scores = scores_of(decoded) if self.config.dense.head == "mask2former" else head.classifier(decoded)
        return self._as_large(scores, images[:, 0])

    def class_maps(
        self,
        model: FineTuned,
        images: Sequence[Tensor],
        sizes: Sequence[Size],
        agree: Callable[[bool], bool] = lambda done: done,
        at_once: int = 1,
    ) -> list[Tensor]:
        """The classes of the pixels of images [3, h, w] in these sizes, int64 [H, W] each. A window of the model's size
        slides over each image, at all of eval.scales and, with eval.flip, mirrored too; what speaks for a class is
        averaged over all windows that see a pixel, of which `at_once` are looked at together. Collective: `agree` tells
        whether all ranks are done."""
        jobs = [
            (n, scale, flip)
            for n in range(len(images))
            for scale in self.config.eval.scales
            for flip in (False, True)[: 1 + self.config.eval.flip]
        ]
        steps = [(job, *step) for job in jobs for step in self._steps(images[job[0]], job[1], at_once)]
        totals: dict[int, Tensor] = {}
        canvas, seen = torch.zeros(0), torch.zeros(0)
        for at in count():
            done = at >= len(steps)
            if agree(done):
                break
            (n, scale, flip), corners, side, is_first, is_last = steps[min(at, len(steps) - 1)]
            view = self._scaled(images[n], scale, flip)
            scores = self.scores(model, torch.stack([view[:, y : y + side[0], x : x + side[1]] for y, x in corners]))
            if done:  # others are not
                continue
            if is_first:
                canvas, seen = scores.new_zeros(scores.shape[1], *view.shape[1:]), scores.new_zeros(view.shape[1:])
            for (y, x), own in zip(corners, scores, strict=True):
                canvas[:, y : y + side[0], x : x + side[1]] += own
                seen[y : y + side[0], x : x + side[1]] += 1
            if is_last:
                whole = resized_to((canvas / seen)[None], sizes[n])[0]
                whole = whole.flip(-1) if flip else whole
                totals[n] = totals[n] + whole if n in totals else whole
        return [totals[n].argmax(0) for n in range(len(images))]

    def _scaled(self, image: Tensor, scale: float, flip: bool) -> Tensor:
        height, width = (max(1, round(side * scale)) for side in image.shape[1:])
        view = image if scale == 1 else resized_to(image[None], (height, width))[0]
        return view.flip(-1) if flip else view

    def _steps(self, image: Tensor, scale: float, at_once: int) -> Iterator[tuple[list[Size], Size, bool, bool]]:
        """For each forward of an image at a scale: upper left corners of windows, their size, whether they are the
        image's first and last ones."""
        size = self.config.model.image_size
        stride = self.config.eval.stride or size * 2 // 3
        whole = [max(1, round(side * scale)) for side in image.shape[1:]]
        side = (min(size, whole[0]), min(size, whole[1]))
        rows, columns = (
            [min(first, all_of - part) for first in range(0, max(all_of - part, 0) + stride, stride)]
            for all_of, part in zip(whole, side, strict=True)
        )
        corners = list(dict.fromkeys((y, x) for y in rows for x in columns))
        for first in range(0, len(corners), at_once):
            yield corners[first : first + at_once], side, first == 0, first + at_once >= len(corners)

    def predict(self, model: FineTuned, inputs: TaskInputs) -> Tensor:
        """Confusions int64 [B, classes, classes]: pixels by their class and what they are taken for. The pictures of
        the last validation are written on the way, each by the rank that has made it."""
        inside = inputs.labels != OUTSIDE
        sizes = [(int(one[:, 0].sum()), int(one[0].sum())) for one in inside]
        size = self.config.model.image_size
        images = []
        for image, (height, width) in zip(inputs.images[:, 0], sizes, strict=True):
            columns, rows = scaled_size(width, height, size)
            images.append(image[:, :rows, :columns])
        found = self.class_maps(model, images, sizes, inputs.agree, len(images))
        confusions = []
        for place, guess, label, image in zip(inputs.keys.tolist(), found, inputs.labels, images, strict=True):
            truth = label[: guess.shape[0], : guess.shape[1]].long()
            known, classes = truth >= 0, len(self.classes)
            pairs = truth[known] * classes + guess[known]
            confusions.append(torch.bincount(pairs, minlength=classes**2).view(classes, classes))
            if self.is_last:
                self._write(self._validation[place], guess)
            if place < self.config.eval.pictures:
                seen = (
                    (127.5 * (resized_to(image[None].float(), truth.shape)[0] + 1)).round().clamp(0, 255).byte().cpu()
                )
                pair = [painted(seen, classes_HW.cpu()) for classes_HW in (truth, guess)]
                self._pictures[f"pictures/{place}"] = torch.cat([seen, *pair], 2)  # image, truth, guess
        return torch.stack(confusions)

    def _write(self, example: Example, guess: Tensor) -> None:
        folder = Path(self.config.out) / "predictions"
        write_numbers(folder / f"{example.name}.png", guess.cpu().numpy() + example.label.first)

    def shown(self) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
        return self._pictures, {}

    def score(self, predictions: Tensor, examples: Sequence[Example]) -> dict[str, float]:
        return overlaps(predictions[0])[0] if predictions.any() else {}

    def write_predictions(self, folder: Path, predictions: Tensor, examples: Sequence[Example]) -> None:
        """classes.csv, confusion.csv; the pictures lie there already."""
        if predictions.any():
            _, by_class = overlaps(predictions[0])
            rows = [("class", "iou", "accuracy", "pixels"), *zip(self.classes, *by_class, strict=True)]
            write_csv(folder / "classes.csv", rows)
            table = [[name, *row] for name, row in zip(self.classes, predictions[0].tolist(), strict=True)]
            write_csv(folder / "confusion.csv", [["", *self.classes], *table])
