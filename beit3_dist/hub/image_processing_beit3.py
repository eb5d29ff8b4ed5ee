"""Images as BEiT-3 sees them when it is used: upright, in RGB, as a square of fixed size, normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

HALF = (0.5, 0.5, 0.5)


class Beit3ImageProcessor(BaseImageProcessor):
    """Whole images, squashed to a square; with `do_center_crop` their largest centred square. Bicubic, antialiased."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | None = None,
        do_center_crop: bool = False,
        image_mean: Sequence[float] = HALF,
        image_std: Sequence[float] = HALF,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.size = dict(size or {"height": 224, "width": 224})
        self.do_center_crop, self.image_mean, self.image_std = do_center_crop, list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None, **ignored: Any) -> BatchFeature:
        """One image, a list of them, or a list of lists, for models that take several a sample: PIL images, or arrays
        uint8 [H, W, 3] -> pixel_values [B, 3, S, S], or [B, k, 3, S, S]."""
        images = [images] if isinstance(images, Image.Image) or getattr(images, "ndim", 4) == 3 else list(images)
        nested = [[self._seen(one) for one in some] if isinstance(some, list | tuple) else self._seen(some)
                  for some in images]  # fmt: skip
        return BatchFeature({"pixel_values": [np.stack(x) if isinstance(x, list) else x for x in nested]},
                            tensor_type=return_tensors)  # fmt: skip

    def __call__(self, images: Any, *arguments: Any, **settings: Any) -> BatchFeature:
        return self.preprocess(images, *arguments, **settings)

    def _seen(self, image: Any) -> np.ndarray:
        """float32 [3, S, S]."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        picture, box = _rgb(ImageOps.exif_transpose(picture)), None
        if self.do_center_crop:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            box = (left, top, left + side, top + side)
        square = picture.resize((self.size["width"], self.size["height"]), Image.Resampling.BICUBIC, box)
        mean, deviation = (np.array(v, np.float32).reshape(3, 1, 1) for v in (self.image_mean, self.image_std))
        return (np.asarray(square, np.float32).transpose(2, 0, 1) / np.float32(255) - mean) / deviation


def _rgb(image: Image.Image) -> Image.Image:
    """In RGB; what is transparent is laid over white."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")
