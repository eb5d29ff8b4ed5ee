"""Images: from the bytes of a file to the two uint8 views that the model and the image tokenizer see.

The augmentation is BEiT's: one random crop that both views share, mirroring, and jitter of brightness, contrast and
saturation. The jitter comes after the crop, not before it as in BEiT, so that it touches fewer pixels: contrast takes
the mean grey of the crop and not of the whole image. It is drawn here, as three numbers, and applied on the device
in one go (`data/views.py`): levels are cut to 0 and 255 after all three changes, not after each.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from beit3_dist.config import DataConfig
from beit3_dist.data.faults import BadSample, check_size
from beit3_dist.data.metadata import upright, without_metadata
from beit3_dist.data.reduced import Box, Decoded, Grid, ReducedImage, reduce
from beit3_dist.opening import open_regular

cv2.setNumThreads(0)  # The loader's processes are the parallelism; OpenCV's threads would fight them.

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
"""What is decoded, whatever the extension says; other decoders of Pillow are never started on foreign bytes. HEIF is
read where the package pillow-heif, which brings its decoder, is installed."""
Reduce = Callable[[Image.Image], Grid | None]
"""Lets an opened image be loaded smaller."""
BYTES_PER_PIXEL, BYTES_BESIDE = 8, 1 << 26
"""The largest file of so many pixels: four channels of 16 bits, uncompressed, and what else it holds (64 MiB)."""
LARGEST_STRIPPED = 1 << 27
"""Bytes of the largest file (128 MiB) of which the metadata are taken out where Pillow stumbles over them."""
RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
"""Boxes that are tried before the centre is taken."""
CONTRAST, SATURATION = 1, 2
"""Numbers of the changes of colour; brightness is 0."""
ORDERS = np.array(list(itertools.permutations(range(3))))


class TooLarge(BadSample):
    """The image has more pixels than are decoded."""


EXTENSION_OF = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
    "AVIF": "avif", "HEIF": "heic",
}  # fmt: skip
"""Pillow's names -> extensions."""


def largest_file(max_pixels: int) -> int:
    return BYTES_PER_PIXEL * max_pixels + BYTES_BESIDE


@contextmanager
def _pillow(max_pixels: int) -> Iterator[None]:
    """Pillow at the one limit of pixels that the run's config names, and its errors as BadSample. Its own limit, which
    belongs to all of the process, is put back."""
    usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # Odd metadata; an image that decodes is good.
        try:
            yield
        except BadSample:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise TooLarge(f"more pixels than data.max_pixels={max_pixels}: {error}") from None
        except UnidentifiedImageError:
            raise BadSample(f"undecodable image: none of {', '.join(_formats())}") from None
        except Exception as error:  # Broken files make Pillow raise nearly anything, from OSError to struct.error.
            raise BadSample(f"undecodable image: {type(error).__name__}: {error}") from None
        finally:
            Image.MAX_IMAGE_PIXELS = usual


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this Pillow knows, with those of installed plugins."""
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def decode(source: bytes | BinaryIO, max_pixels: int) -> Image.Image:
    """The image in a file or its bytes, upright and in RGB; raises BadSample where there is none.

    The size in the file's header is checked against `max_pixels` before any pixel is decoded; of a file, no more than
    the header is read before. Of its metadata, the orientation is used and everything else dropped, however odd it is.
    An alpha channel or a transparent colour is laid over white; 16-bit grey is scaled to 8 bits; palettes, grey and
    CMYK are converted. 32-bit integer and floating-point images have no defined white and are refused.
    """
    return _decoded(source, max_pixels, _whole)[0]


def decode_for(source: bytes | BinaryIO, max_pixels: int, side: int, crop: Callable[[int, int], Box]) -> Decoded:
    """`decode` for views with `side` pixels along each side of the box that `crop` gives for the upright image's
    width and height: large JPEGs are decoded smaller where that leaves such views nearly the same (`reduced.MARGIN`).
    """
    image, grid = _decoded(source, max_pixels, lambda opened: reduce(opened, side, crop))
    return image if grid is None else ReducedImage(image, grid)


def _whole(image: Image.Image) -> None:
    """Every pixel is loaded."""


def _decoded(source: bytes | BinaryIO, max_pixels: int, reduce: Reduce) -> tuple[Image.Image, Grid | None]:
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return _opened(file, max_pixels, reduce)
    except TooLarge:
        raise
    except BadSample:
        if file.seek(0, os.SEEK_END) > LARGEST_STRIPPED:
            raise
        file.seek(0)
        data = file.read()
        if (plain := without_metadata(data)) == data:
            raise
        return _opened(io.BytesIO(plain), max_pixels, reduce)


def _opened(file: BinaryIO, max_pixels: int, reduce: Reduce) -> tuple[Image.Image, Grid | None]:
    with _pillow(max_pixels):
        return _plain(Image.open(file, formats=_formats()), max_pixels, reduce, stays=False)


def normalised(image: Image.Image, max_pixels: int) -> Image.Image:
    """What `decode` makes of an opened image, which stays as it is. Raises BadSample."""
    with _pillow(max_pixels):
        return _plain(image, max_pixels, _whole, stays=True)[0]


def _plain(image: Image.Image, max_pixels: int, reduce: Reduce, stays: bool) -> tuple[Image.Image, Grid | None]:
    """The image upright, in RGB and without metadata, and how it is reduced. `stays`: it is used elsewhere, too."""
    if not image.width * image.height:
        raise BadSample("undecodable image: it has no pixels")
    if image.width * image.height > max_pixels:
        raise TooLarge(f"{image.width} x {image.height} pixels exceed data.max_pixels={max_pixels}")
    grid = reduce(image)
    image.load()
    plain = to_rgb(upright(image))
    if plain.info:  # what is saved from it would hold the profile and the comments
        if plain is image:
            plain = image.copy() if stays else image._new(image.im)  # the same pixels
        plain.info = {}
    return plain, grid


def read_image(path: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    """The image in a file, as `decode` describes it. Raises OSError where it cannot be read or is no regular file,
    BadSample where it holds no image or is larger than one can be."""
    with open_regular(path) as file:
        check_size("an image", os.fstat(file.fileno()).st_size, largest_file(max_pixels))
        return decode(file, max_pixels)


def extension_of(data: bytes) -> str:
    """What the name of a picture with this content ends in. Raises BadSample."""
    with Image.open(io.BytesIO(data)) as image:
        found = EXTENSION_OF.get(image.format or "")
    if found is None:
        raise BadSample(f"pictures of the format {image.format} have no known extension")
    return found


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, as `decode` describes."""
    if image.mode in ("I", "F"):
        raise BadSample(f"undecodable image: mode {image.mode} has no defined white")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.rint(levels).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_box(width: int, height: int, min_scale: float, rng: np.random.Generator) -> Box:
    """Random box (left, top, right, bottom): area in [min_scale, 1] of the image, width over height in [3/4, 4/3]. Ten
    boxes are tried; if none fits, the largest centred box of an allowed ratio is taken (torchvision's
    RandomResizedCrop)."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * RATIO[1])))
    h = min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized(image: Decoded, size: int, box: Box | None = None, flip: bool = False) -> np.ndarray:
    """The image, or a box of it, as a square: bicubic with antialiasing -> uint8 [size, size, 3]."""
    view = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    return cv2.flip(view, 1) if flip else view


def resize_into(room: np.ndarray, image: Decoded, box: Box, flip: bool) -> None:
    """`resized`, written to `room`, uint8 [size, size, 3]: mirroring then costs no pass of its own."""
    view = resized(image, len(room), box)
    if flip:
        cv2.flip(view, 1, dst=room)
    else:
        room[:] = view


def draw_jitter(strength: float, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Changes of N images, from numbers in [0, 1), [N, 4] -> factors and orders, [N, 3] each. The factors of
    brightness, contrast and saturation lie in [1 - strength, 1 + strength]; an order is one of 0, 1, 2."""
    return 1 + strength * (2 * numbers[:, :3] - 1), ORDERS[(numbers[:, 3] * len(ORDERS)).astype(np.int64)]


def jitter_weights(factors: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Weights of a pixel's colour, of its grey, and of the view's mean grey in the new colour, float32 [N, 3].
    Brightness scales a pixel's colour, contrast its distance from the image's mean grey, saturation its distance from
    the pixel's own grey. Each is a linear map of (colour, its grey, mean grey of the view), so the three are one."""
    own, mixed, mean = np.ones(len(orders)), np.zeros(len(orders)), np.zeros(len(orders))
    for change in orders.T:  # after whatever changes came before
        factor = factors[np.arange(len(orders)), change]
        greyed = np.where(change == CONTRAST, (1 - factor) * (own + mixed + mean), 0)
        saturated = change == SATURATION
        mixed = np.where(saturated, mixed + (1 - factor) * own, factor * mixed)
        mean = np.where(saturated, mean, factor * mean + greyed)
        own = factor * own
    return np.stack([own, mixed, mean], axis=1).astype(np.float32)


def two_views(
    image: Decoded, rng: np.random.Generator, model: np.ndarray, tokenizer: np.ndarray | None, config: DataConfig
) -> None:
    """Fills `model`, uint8 [S, S, 3], and `tokenizer`, uint8 [S2, S2, 3], with views of one crop, mirrored alike.
    `tokenizer` is None where both sizes are equal: the views would be identical."""
    box = crop_box(*image.size, config.min_crop_scale, rng)
    flip = rng.random() < config.horizontal_flip
    resize_into(model, image, box, flip)
    if tokenizer is not None:
        resize_into(tokenizer, image, box, flip)


def cropped_view(image: Decoded, rng: np.random.Generator, size: int, min_scale: float, flip: float) -> np.ndarray:
    """A random crop, mirrored with probability `flip`, without jitter -> uint8 [size, size, 3]."""
    box = crop_box(*image.size, min_scale, rng)
    return resized(image, size, box, rng.random() < flip)
