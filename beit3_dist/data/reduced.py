"""JPEGs decoded at a half, a quarter or an eighth of their size, where a crop of them is made much smaller anyway.

A JPEG holds the frequencies of blocks of 8 x 8 pixels. libjpeg can leave the high ones out and compute a block of
4 x 4, 2 x 2 or 1 x 1 pixels, which saves time there and in what follows. Boxes stay in pixels of the whole image, so
that what is drawn for a sample does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from beit3_dist.data.metadata import turn_of

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""
MARGIN = {8: 2.0, 4: 1.75, 2: 1.5}
"""What both sides can be divided by -> pixels along a side that a crop keeps, at least, for each pixel of its view.

With these, views of 60, 112 and 224 pixels of all photographs that were tried (22 of 1280 x 960, and 8 mosaics of them
at their own size, five crops of each) differ from those of the whole decode by 0.2 to 0.5 of 255 levels in the mean, by
0.99 at most. Without any margin it would be up to 4.4."""
MIRRORED_ACROSS = {
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
}
"""Turns that put the file's first pixel to the right."""
MIRRORED_DOWN = {
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
}
"""Turns that put it to the bottom."""
ON_THE_SIDE = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
}
"""Turns that exchange width and height."""


class Crops(NamedTuple):
    """The random crops that a stream's images are decoded for."""

    side: int
    """Pixels along a side of the largest view."""
    min_scale: float
    """Smallest area as a share of the image."""


class CropConfig(Protocol):
    """What a config says of crops."""

    scaled_decoding: bool
    min_crop_scale: float


def crops_of(config: CropConfig, side: int) -> Crops | None:
    """What images are decoded for; None: they are decoded whole."""
    return Crops(side, config.min_crop_scale) if config.scaled_decoding else None


class Grid(NamedTuple):
    """How the pixels of a reduced image lie in the whole one, both upright."""

    size: tuple[int, int]
    """Width and height of the whole image."""
    scale: int
    """Pixels of the whole image along a side of each pixel."""
    origin: tuple[float, float]
    """Where the whole image's left upper corner lies, in reduced pixels: the block that hangs over its edge is the
    file's last one, which a turn may put first."""


@dataclass(frozen=True)
class ReducedImage:
    """What crops are taken from as from a whole image, in its coordinates."""

    pixels: Image.Image
    """Upright and in RGB."""
    grid: Grid

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole image."""
        return self.grid.size

    def resize(self, size: tuple[int, int], resample: Image.Resampling, box: Box | None = None) -> Image.Image:
        """The image, or a box of it in pixels of the whole one, at another size: as Pillow's `Image.resize`."""
        (x, y), scale = self.grid.origin, self.grid.scale
        left, top, right, bottom = box or (0, 0, *self.size)
        return self.pixels.resize(
            size, resample, (x + left / scale, y + top / scale, x + right / scale, y + bottom / scale)
        )


Decoded = Image.Image | ReducedImage
"""What views are made of."""


def scale_for(box: Box, side: int) -> int:
    """What an image's sides are divided by for a view of a box with `side` pixels along each side; 1: nothing."""
    left, top, right, bottom = box
    short = min(right - left, bottom - top)
    return next((scale for scale, margin in MARGIN.items() if short >= scale * margin * side), 1)


def reduce(image: Image.Image, side: int, crop: Callable[[int, int], Box]) -> Grid | None:
    """Lets an opened image be loaded smaller, as its crop allows; None where it is loaded whole.

    `crop`: width and height of the upright image -> the box that is seen of it, in `side` pixels along each side.
    """
    if not isinstance(image, JpegImageFile) or min(image.size) < 2 * MARGIN[2] * side:
        return None
    width, height = image.size
    turn = turn_of(image)
    size = (height, width) if turn in ON_THE_SIDE else (width, height)
    scale = scale_for(crop(*size), side)
    if scale == 1:
        return None
    image.draft(None, (width // scale, height // scale))
    over = [-(-pixels // scale) - pixels / scale for pixels in size]  # of the last block, in reduced pixels
    return Grid(size, scale, (over[0] * (turn in MIRRORED_ACROSS), over[1] * (turn in MIRRORED_DOWN)))
