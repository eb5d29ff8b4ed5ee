"""Pictures of every mode become the RGB they show, bombs are refused unread, and both views show the same crop."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from beit3_dist.config import DataConfig
from beit3_dist.data import transforms
from beit3_dist.data.faults import BadSample
from beit3_dist.data.views import jittered
from tests.unit.tar_fixtures import picture

LIMIT = 100_000


def config(**changes: float) -> DataConfig:
    return DataConfig(images="", texts="", pairs="", **changes)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    result = transforms.decode(encoded(image, kind, **options), LIMIT)
    assert result.mode == "RGB"
    return np.asarray(result)


COLOURS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREYS = COLOURS[:, :, 0]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_rgb_is_kept(kind: str) -> None:
    assert np.array_equal(decoded(Image.fromarray(COLOURS), kind), COLOURS)


def test_grey_palette_and_two_colours() -> None:
    threefold = np.repeat(GREYS[:, :, None], 3, axis=2)
    assert np.array_equal(decoded(Image.fromarray(GREYS)), threefold)
    palette = Image.fromarray(COLOURS).quantize(32)
    assert np.array_equal(decoded(palette), np.asarray(palette.convert("RGB")))
    assert np.array_equal(decoded(palette, "GIF"), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(GREYS > 128)
    assert np.array_equal(decoded(bits)[:, :, 0], np.where(GREYS > 128, 255, 0))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (6, 5), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    image = Image.fromarray(COLOURS).convert(mode[:-1])
    shown = np.asarray(image.convert("RGB")).astype(float)
    image.putalpha(Image.fromarray(alpha))
    share = alpha[:, :, None] / 255
    # One grey level for the rounding of the composition.
    assert np.abs(decoded(image) - (share * shown + (1 - share) * 255)).max() <= 1
    assert (decoded(image)[0] == 255).all() and np.array_equal(decoded(image)[1], shown[1])


def test_transparent_palette_colour_is_white() -> None:
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 0, 0, 0])
    assert decoded(image, transparency=1).tolist() == [[[10, 20, 30], [255] * 3], [[70, 80, 90], [0] * 3]]


def test_sixteen_bits_are_scaled() -> None:
    levels = np.array([[0, 257, 128], [32767, 32896, 65535]], dtype=np.uint16)
    expected = np.rint(levels / 257).astype(np.uint8)
    assert expected.tolist() == [[0, 1, 0], [127, 128, 255]]
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decoded(Image.fromarray(levels), kind)[:, :, 1], expected)


def test_cmyk() -> None:
    ink = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    assert np.abs(decoded(ink, "TIFF") - np.array([0, 255, 255])).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pictures_without_a_white_are_refused(dtype: type) -> None:
    with pytest.raises(BadSample, match="no defined white"):
        decoded(Image.fromarray(GREYS.astype(dtype)), "TIFF")


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (5, lambda a: a.transpose(1, 0, 2)),
    ],
)
def test_exif_orientation(orientation: int, upright: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(Image.fromarray(COLOURS), exif=exif), upright(COLOURS))


def test_bombs_are_refused_before_a_pixel_is_decoded() -> None:
    """A PNG whose header claims 60,000 x 60,000 pixels and that has no pixel data at all."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT"):
        bomb += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for limit in (1000, 100_000_000, 3_000_000_000):  # Pillow's error, its warning's range, our own limit alone.
        with pytest.raises(BadSample, match="max_pixels"):
            transforms.decode(bomb, limit)
    data = picture(0, 40, 30)
    assert transforms.decode(data, 1200).size == (40, 30)
    with pytest.raises(BadSample, match="pixels .*data.max_pixels=1199"):
        transforms.decode(data, 1199)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"hello" * 50,
        lambda data: data[:60] + bytes(40) + data[100:],
        lambda data: b"%!PS-Adobe-3.0 EPSF\n",
    ],
)
def test_broken_pictures_are_bad_samples(damage: object) -> None:
    with pytest.raises(BadSample, match="undecodable image"):
        transforms.decode(damage(picture(0)), LIMIT)
    with pytest.raises(BadSample, match="undecodable image"):
        transforms.decode(picture(0, kind="JPEG")[:-200], LIMIT)


@given(width=st.integers(1, 500), height=st.integers(1, 500), least=st.floats(0.05, 1), seed=st.integers(0, 1 << 32))
@settings(deadline=None, max_examples=200)
def test_crop_boxes(width: int, height: int, least: float, seed: int) -> None:
    left, top, right, bottom = transforms.crop_box(width, height, least, np.random.default_rng(seed))
    w, h = right - left, bottom - top
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    # Sides are rounded to whole pixels, which moves area and ratio by half a pixel on each side.
    assert (w + 0.5) / (h - 0.5) >= 3 / 4 and (w - 0.5) / (h + 0.5) <= 4 / 3
    if 3 / 4 <= width / height <= 4 / 3:
        assert (w + 0.5) * (h + 0.5) >= least * width * height


def test_crop_areas_are_uniform() -> None:
    """Mean area of crops in [0.2, 1]: 0.6 but for those too wide or high to fit, which lower it a little."""
    rng = np.random.default_rng(0)
    boxes = [transforms.crop_box(1000, 1000, 0.2, rng) for _ in range(4000)]
    areas = [(right - left) * (bottom - top) / 1e6 for left, top, right, bottom in boxes]
    assert min(areas) < 0.21 and max(areas) > 0.97 and 0.53 < np.mean(areas) < 0.6


def test_very_wide_pictures_are_cropped_in_the_centre() -> None:
    assert transforms.crop_box(1000, 30, 0.9, np.random.default_rng(0)) == (480, 0, 520, 30)
    assert transforms.crop_box(30, 1000, 0.9, np.random.default_rng(0)) == (0, 480, 30, 520)


PILLOWS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def applied(factors: tuple[float, ...], order: tuple[int, ...], view: np.ndarray) -> np.ndarray:
    """The view [S, S, 3] after the jitter, as the device applies it."""
    weights = transforms.jitter_weights(np.array([factors]), np.array([order]))
    pictures = torch.from_numpy(view.copy()).permute(2, 0, 1)[None]
    return jittered(pictures, torch.from_numpy(weights))[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("change", range(3))
@pytest.mark.parametrize("factor", [0.6, 0.93, 1.0, 1.4])
def test_jitter_agrees_with_pillow(change: int, factor: float) -> None:
    """Pillow cuts fractions off where we round, and takes whole numbers for greys: two levels."""
    view = np.asarray(Image.open(io.BytesIO(picture(3, 64, 64))))
    factors = tuple(factor if number == change else 1.0 for number in range(3))
    ours = applied(factors, (0, 1, 2), view)
    assert ours.dtype == np.uint8 and ours.shape == view.shape
    difference = ours.astype(int) - np.asarray(PILLOWS[change](Image.fromarray(view)).enhance(factor)).astype(int)
    assert np.abs(difference).max() <= 2
    assert factor == 1 or np.abs(ours.astype(int) - view).max() > 5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_jitter_in_any_order_agrees_with_pillow(order: tuple[int, int, int]) -> None:
    """One change after the other, on levels that none of them clips: two levels for each change."""
    view = (np.asarray(Image.open(io.BytesIO(picture(3, 64, 64)))) * 0.3 + 80).astype(np.uint8)
    factors = (0.8, 1.3, 0.6)
    theirs = Image.fromarray(view)
    for change in order:
        theirs = PILLOWS[change](theirs).enhance(factors[change])
    ours = applied(factors, order, view)
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 6
    assert np.abs(ours.astype(int) - view).max() > 20


def test_jitter_is_drawn_in_range_and_order() -> None:
    factors, orders = transforms.draw_jitter(0.4, np.random.default_rng(0).random((300, 4)))
    assert 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4
    assert set(map(tuple, orders.tolist())) == set(itertools.permutations(range(3)))
    together = transforms.jitter_weights(factors, orders)
    alone = [transforms.jitter_weights(*pair)[0] for pair in zip(factors[:, None], orders[:, None], strict=True)]
    assert together.dtype == np.float32 and (together == alone).all()
    view = np.asarray(Image.open(io.BytesIO(picture(3, 64, 64))))
    assert not applied((0.0, 1.0, 1.0), (2, 0, 1), view).any()
    assert len(np.unique(applied((1.0, 0.0, 1.0), (0, 1, 2), view))) == 1


def two_views(
    image: Image.Image, rng: np.random.Generator, size: int, other: int, config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Both views, in rooms of these sizes."""
    model, tokenizer = (np.empty((side, side, 3), dtype=np.uint8) for side in (size, other))
    transforms.two_views(image, rng, model, tokenizer, config)
    return model, tokenizer


def test_views_show_the_same_crop() -> None:
    """A model view of 32 pixels and the tokenizer's of 64, averaged down to it, in draws of crop, flip and jitter."""
    image = transforms.decode(picture(1, 160, 120), LIMIT)
    seen = []
    for seed in range(30):
        view, other = two_views(image, np.random.default_rng(seed), 32, 64, config())
        assert view.shape == (32, 32, 3) and other.shape == (64, 64, 3) and view.dtype == other.dtype == np.uint8
        means = other.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        # Bicubic is no box filter: smooth pictures differ by a few levels, another crop or flip by tens.
        assert np.abs(means - view).mean() < 3
        seen.append(view.astype(int))
    assert np.mean([np.abs(a - b).mean() for a, b in zip(seen, seen[1:], strict=False)]) > 10


def test_equal_sizes_need_one_view() -> None:
    image = transforms.decode(picture(1), LIMIT)
    view, same = two_views(image, np.random.default_rng(0), 32, 32, config())
    alone = np.empty((32, 32, 3), dtype=np.uint8)
    transforms.two_views(image, np.random.default_rng(0), alone, None, config())
    assert np.array_equal(view, same) and np.array_equal(view, alone)


def test_nothing_drawn_leaves_the_picture() -> None:
    """Whole crop, no flip, no jitter: the resized picture; always flipped: its mirror image."""
    image = transforms.decode(picture(1, 64, 64), LIMIT)
    plain = transforms.resized(image, 32)
    still = {"min_crop_scale": 1.0, "color_jitter": 0.0}
    found = [
        two_views(image, np.random.default_rng(seed), 32, 32, config(horizontal_flip=flip, **still))[0]
        for flip in (0.0, 1.0)
        for seed in range(20)
    ]
    # With area 1 only ratio 1 fits; where ten draws miss it, the fallback is the whole square too.
    assert all(np.array_equal(view, plain) for view in found[:20])
    assert all(np.array_equal(view, transforms.resized(image, 32, None, flip=True)) for view in found[20:])
    assert np.abs(found[20].astype(int)[:, ::-1] - plain).max() == 0


def test_single_pixel_picture() -> None:
    image = transforms.decode(picture(1, 1, 1), LIMIT)
    view, _ = two_views(image, np.random.default_rng(0), 32, 32, config())
    assert view.shape == (32, 32, 3)


def test_metadata_are_left_behind_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, "JPEG", comment=b"a comment")
    opened = Image.open(io.BytesIO(file.getvalue()))
    assert transforms.normalised(opened, 100).info == {} and opened.info["comment"] == b"a comment"
    monkeypatch.setattr(Image.Image, "copy", lambda image: pytest.fail("pixels that nobody else has were copied"))
    decoded = transforms.decode(file.getvalue(), 100)
    assert decoded.info == {} and decoded.tobytes() == opened.tobytes()


def test_pillows_own_limit_is_put_back() -> None:
    usual = Image.MAX_IMAGE_PIXELS
    transforms.decode(picture(1), LIMIT)
    with pytest.raises(BadSample):
        transforms.decode(picture(1), 10)
    assert usual == Image.MAX_IMAGE_PIXELS != LIMIT
