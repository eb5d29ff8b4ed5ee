"""Predictions drawn into their images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from beit3_dist.tasks.parts.average_precision import Detections

OPAQUE = 0.45
"""Of a mask."""
PAINTED = 0.6
"""Of the colours of all pixels' classes."""
DRAWN = 0.5
"""Score from which a detection is drawn."""


def colour_of(number: int) -> tuple[int, int, int]:
    """Of a class: neighbours are far apart on the circle of hues."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def with_objects(image: Image.Image, found: Detections, classes: Sequence[str], least: float = DRAWN) -> Image.Image:
    """A copy of an RGB image with the boxes, the masks, and the names and scores of what was found in it."""
    pixels = np.array(image, dtype=np.float32)
    drawn = [place for place in range(len(found.labels)) if found.scores[place] >= least]
    for place in drawn if found.masks is not None else ():
        assert found.masks is not None
        inside = found.masks[place] > 0
        pixels[inside] += OPAQUE * (np.array(colour_of(found.labels[place])) - pixels[inside])
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    canvas, line = ImageDraw.Draw(picture), max(1, round(max(image.size) / 300))
    for place in reversed(drawn):  # the best on top
        label, box = int(found.labels[place]), found.boxes[place].tolist()
        name = classes[label] if label < len(classes) else str(label)
        canvas.rectangle(box, outline=colour_of(label), width=line)
        canvas.text((box[0] + line + 1, box[1] + line), f"{name} {found.scores[place]:.2f}", fill=colour_of(label))
    return picture


def painted(image: Tensor, classes: Tensor) -> Tensor:
    """An image uint8 [3, H, W] under the colours of its pixels' classes int64 [H, W], but where they are below 0."""
    table = torch.tensor([colour_of(number) for number in range(int(classes.max().clamp(min=0)) + 1)])
    paint = table[classes.clamp(min=0)].permute(2, 0, 1)
    mixed = (1 - PAINTED) * image + PAINTED * paint
    return torch.where(classes >= 0, mixed.round().byte(), image)
