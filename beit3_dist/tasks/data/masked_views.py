"""Views of images with a class for each pixel, and batches of their labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageEnhance

from beit3_dist.tasks.data.augmentation import GREY, Views
from beit3_dist.tasks.data.examples import Example
from beit3_dist.tasks.data.masks import NOTHING, labels_of

OUTSIDE = -2
"""Label of what fills a smaller image up in a batch."""
LONGEST = 4
"""Longer side of an image, in shorter ones of the model's, at which it is made smaller (mmsegmentation: 2,048 of 512).
"""
CROPS = 10
"""Crops that are tried before one stays of which a class takes more than its share."""
MOST_OF_A_CLASS = 0.75
BRIGHTNESS, CONTRAST, HUE = 32 / 255, 0.5, 18 / 360
"""Photometric distortion: largest changes, by mmsegmentation; saturation's is contrast's."""


def stacked_labels(examples: Sequence[Example]) -> torch.Tensor:
    """int16 [B, H, W] of the examples' labels, `OUTSIDE` where one is smaller than the largest."""
    height, width = (max(example.label.shape[side] for example in examples) for side in (0, 1))
    labels = torch.full((len(examples), height, width), OUTSIDE, dtype=torch.int16)
    for row, example in zip(labels, examples, strict=True):
        row[: example.label.shape[0], : example.label.shape[1]] = torch.from_numpy(example.label)
    return labels


def scaled_size(width: int, height: int, size: int, scale: float = 1.0) -> tuple[int, int]:
    """Width and height of an image whose shorter side becomes `size` times `scale`, or whose longer one four times as
    much, whichever is less."""
    factor = scale * min(size / min(width, height), LONGEST * size / max(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


@dataclass(frozen=True, kw_only=True)
class MaskedViews(Views):
    """Views of images with their masks."""

    classes: int | None
    scales: tuple[float, float] = (0.5, 2.0)
    """Bounds of the random scale, of which 1 makes the shorter side the model's."""
    photometric: bool = False
    """Whether brightness, contrast, saturation and hue change."""

    def of_training(
        self, example: Example, images: Sequence[Image.Image], size: int, rngs: Iterable[np.random.Generator]
    ) -> tuple[Example, list[np.ndarray]]:
        """A random scale, a crop of which no class takes more than three quarters if ten tries find one, mirroring and
        colours; grey and nothing fill up what an image lacks."""
        (image,), (rng,) = images, rngs
        labels = Image.fromarray(labels_of(example.label, image.size, self.classes).astype(np.int32))
        width, height = scaled_size(*image.size, size, rng.uniform(*self.scales))
        inside = min(size, width), min(size, height)
        for _ in range(CROPS):
            left, top = (
                int(rng.integers(whole - part + 1)) for whole, part in zip((width, height), inside, strict=True)
            )
            across, down = image.width / width, image.height / height
            box = (left * across, top * down, (left + inside[0]) * across, (top + inside[1]) * down)
            chosen = np.asarray(labels.resize(inside, Image.Resampling.NEAREST, box))
            counts = np.bincount(chosen[chosen != NOTHING])
            if (counts > 0).sum() > 1 and counts.max() < MOST_OF_A_CLASS * counts.sum():
                break
        view = image.resize(inside, Image.Resampling.BILINEAR, box)
        if self.photometric:
            view = distorted(view, rng)
        pixels = np.full((size, size, 3), GREY, np.uint8)
        pixels[: inside[1], : inside[0]] = np.asarray(view)
        known = np.full((size, size), NOTHING, np.int16)
        known[: inside[1], : inside[0]] = chosen
        if rng.random() < self.horizontal_flip:
            pixels, known = pixels[:, ::-1], known[:, ::-1].copy()
        return replace(example, label=known), [pixels]

    def of_evaluation(
        self, example: Example, images: Sequence[Image.Image], size: int
    ) -> tuple[Example, list[np.ndarray]]:
        """The whole image, scaled, with the labels of the image as it is."""
        (image,) = images
        return replace(example, label=labels_of(example.label, image.size, self.classes)), [self.evaluate(image, size)]

    def evaluate(self, image: Image.Image, size: int) -> np.ndarray:
        return np.asarray(image.resize(scaled_size(*image.size, size), Image.Resampling.BILINEAR))


def distorted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Photometric distortion (SSD, Liu et al. 2016, as mmsegmentation has it): each change with probability a half;
    contrast is the first or the last of the others."""
    contrast_first = rng.random() < 0.5
    changes = rng.random(4) < 0.5
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)

    def stretched(image: Image.Image) -> Image.Image:
        return image.point(lambda level: level * (1 + CONTRAST * contrast)) if changes[1] else image

    if changes[0]:
        image = image.point(lambda level: level + 255 * BRIGHTNESS * brightness)
    image = stretched(image) if contrast_first else image
    if changes[2]:
        image = ImageEnhance.Color(image).enhance(1 + CONTRAST * saturation)
    if changes[3]:
        tone, *others = image.convert("HSV").split()
        tone = tone.point(lambda level: (level + round(256 * HUE * hue)) % 256)
        image = Image.merge("HSV", (tone, *others)).convert("RGB")
    return image if contrast_first else stretched(image)
