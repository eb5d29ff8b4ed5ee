"""Views of images with boxes and masks of objects, and their batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from beit3_dist.data.batch import Tensors
from beit3_dist.data.faults import BadSample
from beit3_dist.tasks.data.augmentation import GREY, Views
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.data.objects import Marked, bitmap, box_of


@dataclass(frozen=True, slots=True)
class Seen:
    """The objects of a view, in its pixels."""

    boxes: np.ndarray
    """float32 [n, 4]: x0, y0, x1, y1."""
    labels: np.ndarray
    """int64 [n]."""
    masks: np.ndarray
    """uint8 [n, S, S / 8, rounded up]: a bit a pixel; [0, ...] where masks are not asked for."""


@dataclass(eq=False)
class Objects(Tensors):
    """Those of B views, filled up to the most of one, M; none in evaluation."""

    boxes: torch.Tensor
    """float32 [B, M, 4]: x0, y0, x1, y1 in pixels."""
    labels: torch.Tensor
    """int64 [B, M]; -1: not one."""
    masks: torch.Tensor
    """uint8 [B, M, S, S / 8], or [B, 0, ...]."""


@dataclass(frozen=True)
class Scaled:
    """Where a view of side S shows an image: scaled to `width` x `height` pixels, its corner at (-left, -top), perhaps
    mirrored before; what it does not cover is grey."""

    width: int
    height: int
    left: int = 0
    top: int = 0
    mirrored: bool = False

    @classmethod
    def fitting(cls, size: tuple[int, int], side: int, factor: float = 1.0) -> Scaled:
        """Of an image of this width and height, whose longer side becomes `factor` times the view's."""
        scale = factor * side / max(size)
        return cls(max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))

    def shown(self, side: int) -> tuple[int, int]:
        """Columns and rows of the view that the image covers."""
        return min(side, self.width - self.left), min(side, self.height - self.top)

    def view(self, image: Image.Image, side: int, fill: Any, resampling: Image.Resampling) -> np.ndarray:
        """uint8 [S, S, ...] of an image."""
        (columns, rows), (width, height) = self.shown(side), image.size
        across, down = width / self.width, height / self.height
        box = (self.left * across, self.top * down, (self.left + columns) * across, (self.top + rows) * down)
        if self.mirrored:
            box = (width - box[2], box[1], width - box[0], box[3])
        part = np.asarray(image.resize((columns, rows), resampling, box))
        view = np.empty((side, side, *part.shape[2:]), dtype=np.uint8)
        view[:] = fill
        view[:rows, :columns] = part[:, ::-1] if self.mirrored else part
        return view

    def boxes(self, boxes_N4: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
        """Boxes x0, y0, x1, y1 of an image of this width and height, in the view, cut at its edges."""
        found = boxes_N4 * np.tile([self.width / size[0], self.height / size[1]], 2)
        if self.mirrored:
            found[:, [0, 2]] = self.width - found[:, [2, 0]]
        found -= np.tile([self.left, self.top], 2)
        return found.clip(0, np.tile(self.shown(side), 2)).astype(np.float32)


@dataclass(frozen=True)
class ObjectViews(Views):
    """Views of images whose sides keep their ratio, and what of their objects is in them."""

    scales: tuple[float, float] = (0.1, 2.0)
    """Of the longer side of a training image, as shares of the view's: large-scale jitter (Ghiasi et al. 2021)."""
    masks: bool = False

    def of_training(
        self, example: Example, images: Sequence[Image.Image], size: int, rngs: Iterable[np.random.Generator]
    ) -> tuple[Example, list[np.ndarray]]:
        """Mirrored, scaled, and cut or filled up to the view; as a new label what is seen of the objects."""
        (image,), (rng,), marked = images, rngs, example.label
        if image.size != (marked.width, marked.height):
            said = f"{marked.width} x {marked.height}"
            raise BadSample(f"the image has {image.width} x {image.height} pixels, and its index says {said}")
        mirrored = rng.random() < self.horizontal_flip
        scaled = Scaled.fitting(image.size, size, rng.uniform(*self.scales))
        left, top = (int(rng.integers(max(0, side - size) + 1)) for side in (scaled.width, scaled.height))
        scaled = replace(scaled, left=left, top=top, mirrored=mirrored)
        view = scaled.view(image, size, GREY, Image.Resampling.BILINEAR)
        return replace(example, label=self._seen(marked, scaled, size)), [view]

    def _seen(self, marked: Marked, scaled: Scaled, side: int) -> Seen:
        """The objects that a view shows anything of; boxes are those of what it shows of the masks."""
        objects = [one for one in marked.objects or () if not one.get("crowd")]
        size = (marked.width, marked.height)
        corners = np.array([one["box"] for one in objects], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = scaled.boxes(corners, size, side)
        labels = np.array([one["label"] for one in objects], dtype=np.int64)
        shown = np.asarray((boxes[:, 2:] > boxes[:, :2]).all(1))
        packed = np.zeros((0, side, -(-side // 8)), dtype=np.uint8)
        if self.masks:
            drawn = [np.zeros((0, side, side), dtype=np.uint8)]
            for place in np.flatnonzero(shown):
                whole = Image.fromarray(bitmap(objects[place]["mask"], marked.height, marked.width))
                drawn.append(scaled.view(whole, side, 0, Image.Resampling.NEAREST)[None])
                boxes[place] = box_of(drawn[-1][0])
                shown[place] = bool(drawn[-1].any())
                if not shown[place]:
                    drawn.pop()
            packed = np.packbits(np.concatenate(drawn), axis=2)
        return Seen(boxes[shown], labels[shown], packed)

    def evaluate(self, image: Image.Image, size: int) -> np.ndarray:
        """The whole image in the upper left corner, its longer side that of the view -> uint8 [size, size, 3]."""
        return Scaled.fitting(image.size, size).view(image, size, GREY, Image.Resampling.BILINEAR)


def objects_of(examples: Sequence[Example]) -> Objects:
    """The objects of views as a batch; none of those that are evaluated."""
    seen = [example.label for example in examples if isinstance(example.label, Seen)]
    most = max((len(one.labels) for one in seen), default=0)
    boxes = torch.zeros(len(seen), most, 4)
    labels = torch.full((len(seen), most), -1)
    row, column = seen[0].masks.shape[1:] if seen else (0, 0)
    with_masks = any(len(one.masks) for one in seen)
    masks = torch.zeros(len(seen), most if with_masks else 0, row, column, dtype=torch.uint8)
    for place, one in enumerate(seen):
        count = len(one.labels)
        boxes[place, :count], labels[place, :count] = torch.from_numpy(one.boxes), torch.from_numpy(one.labels)
        if with_masks:
            masks[place, :count] = torch.from_numpy(one.masks)
    return Objects(boxes, labels, masks)


def unpacked(masks: torch.Tensor, side: int) -> torch.Tensor:
    """Masks uint8 [n, S, S / 8] as float [n, S, S]."""
    bits = torch.arange(7, -1, -1, device=masks.device, dtype=torch.uint8)
    return ((masks[..., None] >> bits) & 1).flatten(2)[..., :side].float()
