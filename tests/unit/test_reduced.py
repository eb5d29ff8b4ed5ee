"""Large JPEGs are decoded smaller: the same boxes in the same places, no crop below its view's size, nearly the same
levels; and what is not decoded smaller keeps every bit."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from beit3_dist.config import BatchConfig, DataConfig, RunConfig
from beit3_dist.data import reduced, transforms
from beit3_dist.data.batch import MicroBatch, MixedBatches, requests_from
from beit3_dist.data.faults import BadSample
from beit3_dist.data.loader import loader
from beit3_dist.data.metadata import ORIENTATION, TURNS
from beit3_dist.data.reduced import MARGIN, ReducedImage, reduce, scale_for
from beit3_dist.image_tokenizer.codes import PrecomputedCodes
from beit3_dist.image_tokenizer.config import TokenizerDataConfig
from beit3_dist.image_tokenizer.images import ImageBatches
from beit3_dist.tools.benchmarks.data import photograph
from tests.unit.tar_fixtures import picture, small_run, write_tar

LIMIT = 10**8
LEVELS = 1.25
"""Mean difference of a view's levels that the config promises to stay below."""
BACK = {  # what undoes a turn
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}


def jpeg(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{"quality": 100, "subsampling": 0, **options})
    return file.getvalue()


def photographs() -> list[Image.Image]:
    """A portrait at 1280 x 960 and at its own size, and two of the benchmark's noisy images."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        portrait = Image.open(file).convert("RGB")
    noisy = [Image.open(io.BytesIO(photograph(seed, (1280, 960)))) for seed in range(2)]
    return [portrait.resize((1280, 960), Image.Resampling.LANCZOS), portrait, *noisy]


@given(
    st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(51, 9000), st.integers(51, 9000)), st.integers(1, 600)
)
def test_a_crop_keeps_more_pixels_than_its_view(box: tuple[int, int, int, int], side: int) -> None:
    """And the next larger scale would leave too few."""
    scale, short = scale_for(box, side), min(box[2] - box[0], box[3] - box[1])
    assert scale == 1 or short / scale >= MARGIN[scale] * side > side
    assert scale == 8 or short / (2 * scale) < MARGIN[2 * scale] * side


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_boxes_lie_where_they_lay(orientation: int, scale: int) -> None:
    """Of images whose grey counts columns or rows, the mean of a view is the middle of its box, to the rounding of
    levels, although the last blocks hang over the edge, wherever a turn puts them."""
    sizes, side = (213, 183), 70 // scale
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turn = TURNS.get(orientation)
    for axis, counted in enumerate(np.meshgrid(*map(np.arange, sizes))):
        upright = Image.fromarray(counted.astype(np.uint8))
        data = jpeg(upright if turn is None else upright.transpose(BACK.get(turn, turn)), exif=exif)
        for seed in range(5):
            rng = np.random.default_rng(seed)
            left, top = (int(rng.integers(size - 150)) for size in sizes)
            box = (left, top, left + 145 + seed, top + 142 + seed)

            def crop(*size: int, box: tuple[int, int, int, int] = box) -> tuple[int, int, int, int]:
                assert size == sizes
                return box

            found = transforms.decode_for(data, LIMIT, side, crop)
            assert isinstance(found, ReducedImage) and found.size == sizes and found.grid.scale == scale
            for seen, middle in [(box, (box[axis] + box[axis + 2] - 1) / 2), (None, (sizes[axis] - 1) / 2)]:
                assert transforms.resized(found, side, seen).mean() == pytest.approx(middle, abs=0.75)


@pytest.mark.parametrize("number", range(4))
def test_levels_stay_within_the_bound(number: int) -> None:
    """Also of the image tokenizer's view, which comes from the same pixels and may be smaller."""
    data = jpeg(photographs()[number], quality=90, subsampling=2)
    config = DataConfig()
    scales = set()
    for seed, (side, other) in itertools.product(range(6), [(224, 112), (112, 224), (60, 60)]):
        views = []
        for reduces in (True, False):
            rng = np.random.default_rng(seed)
            found: reduced.Decoded = transforms.decode(data, LIMIT)
            if reduces:
                found = transforms.decode_for(
                    data,
                    LIMIT,
                    max(side, other),
                    lambda *size: transforms.crop_box(*size, config.min_crop_scale, np.random.default_rng(seed)),  # noqa: B023
                )
                scales.add(found.grid.scale if isinstance(found, ReducedImage) else 1)
            rooms = [np.empty((room, room, 3), dtype=np.uint8) for room in (side, other)]
            transforms.two_views(found, rng, rooms[0], rooms[1], config)
            views.append([room.astype(int) for room in rooms])
        for ours, whole in zip(*views, strict=True):
            assert np.abs(ours - whole).mean() < LEVELS
    assert max(scales) > 2


def test_what_is_not_reduced_keeps_its_bits() -> None:
    """Small crops, other formats, and JPEGs that are no larger than their views."""
    large = photographs()[0]
    for data, box in [
        (jpeg(large), (0, 0, 600, 671)),
        (jpeg(large, "WEBP", lossless=True), (0, 0, 1280, 960)),
        (jpeg(large.resize((320, 240))), (0, 0, 320, 240)),
        (picture(0), (0, 0, 40, 30)),
    ]:
        found = transforms.decode_for(data, LIMIT, 224, lambda width, height, box=box: box)
        assert isinstance(found, Image.Image) and found.tobytes() == transforms.decode(data, LIMIT).tobytes()


@pytest.mark.parametrize("kind", ["grey", "CMYK", "progressive", "MPO"])
def test_every_kind_of_jpeg_is_reduced(kind: str) -> None:
    large = photographs()[0]
    match kind:
        case "grey":
            data = jpeg(large.convert("L"))
        case "CMYK":
            data = jpeg(large.convert("CMYK"))
        case "progressive":
            data = jpeg(large, progressive=True)
        case _:  # a telephone's, with a second image in it
            data = jpeg(large, "MPO", save_all=True, append_images=[large.resize((64, 48))])
    box = (100, 50, 1100, 950)
    found = transforms.decode_for(data, LIMIT, 100, lambda width, height: box)
    assert isinstance(found, ReducedImage) and found.grid.scale == 4 and found.pixels.size == (320, 240)
    whole = transforms.resized(transforms.decode(data, LIMIT), 100, box).astype(int)
    assert np.abs(transforms.resized(found, 100, box) - whole).mean() < LEVELS


def test_damage_is_found_and_metadata_are_dropped() -> None:
    data, noted = (jpeg(photographs()[0], comment=comment) for comment in (b"", b"a comment"))
    with pytest.raises(BadSample, match="undecodable image"):
        transforms.decode_for(data[: len(data) // 2], LIMIT, 100, lambda width, height: (0, 0, width, height))
    with pytest.raises(BadSample, match="max_pixels"):
        transforms.decode_for(data, 1000, 100, lambda width, height: (0, 0, width, height))
    found = transforms.decode_for(noted, LIMIT, 100, lambda width, height: (0, 0, width, height))
    assert isinstance(found, ReducedImage) and found.pixels.info == {}


# ------------------------------------------------------------------------------------------------------ whole batches


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Images and pairs of 190 x 150 pixels, for views of 32 and 40."""
    folder = tmp_path_factory.mktemp("run")
    run = small_run(folder)
    jpegs = [jpeg(Image.open(io.BytesIO(photograph(seed, (190, 150))))) for seed in range(8)]
    for name in ("images", "pairs"):
        words = {"txt": b"a bird on a tree"} if name == "pairs" else {}
        write_tar(
            folder / f"large-{name}.tar", [{"__key__": f"{n}", "jpg": data} | words for n, data in enumerate(jpegs)]
        )
    data = replace(run.data, images=str(folder / "large-images.tar"), pairs=str(folder / "large-pairs.tar"))
    return replace(run, data=data, batch=BatchConfig(images=4, texts=0, pairs=4))


def read(run: RunConfig, first: int, steps: int, workers: int) -> list[MicroBatch]:
    consumed = (run.batch.images * first, 0, run.batch.pairs * first)
    requests = itertools.islice(requests_from(consumed, run.batch), steps)
    return list(loader(MixedBatches(run, 40, 0, 1), requests, workers, 2, pin=False))


def test_batches_are_the_same_of_any_number_of_workers_and_after_a_resume(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def spied(image: Image.Image, side: int, crop: object) -> object:
        made.append(reduce(image, side, crop))
        return made[-1]

    monkeypatch.setattr(transforms, "reduce", spied)
    plain = read(run, 0, 3, workers=0)
    assert len(made) == 24 and 8 < sum(grid is not None for grid in made) < 24, "some crops are too small"
    for other in (read(run, 0, 3, workers=2), plain[:1] + read(run, 1, 2, workers=1)):
        for ours, theirs in zip(plain, other, strict=True):
            for name, samples in ours.streams.items():
                assert torch.equal(samples.images, theirs.streams[name].images)
                assert torch.equal(samples.tokenizer_images, theirs.streams[name].tokenizer_images)


def test_samples_crops_and_draws_are_those_of_whole_decoding(run: RunConfig) -> None:
    """The levels differ a little; another crop of these noisy images would differ by tens."""
    whole = read(replace(run, data=replace(run.data, scaled_decoding=False)), 0, 3, workers=0)
    differences = []
    for ours, theirs in zip(read(run, 0, 3, workers=0), whole, strict=True):
        for name, samples in ours.streams.items():
            other = theirs.streams[name]
            assert torch.equal(samples.ids, other.ids) and torch.equal(samples.jitter, other.jitter)
            for field in ("images", "tokenizer_images"):
                seen, expected = getattr(samples, field).float(), getattr(other, field).float()
                differences += (seen - expected).abs().mean((1, 2, 3)).tolist()
    assert 0 < max(differences) < 2 * LEVELS  # views so small of images so noisy
    assert min(differences) == 0


def test_the_image_tokenizers_training_reduces_too(run: RunConfig) -> None:
    views = [
        ImageBatches(
            TokenizerDataConfig(
                images=run.data.images, cache=run.data.cache, min_crop_scale=0.5, scaled_decoding=reduces
            ),
            32, 0, 4, 0, 1,
        )[0].images.float()
        for reduces in (True, False)
    ]  # fmt: skip
    assert 0 < (views[0] - views[1]).abs().mean() < LEVELS


def test_codes_of_former_folders_are_of_whole_images(tmp_path: Path) -> None:
    """Their manifest does not say how images were decoded: it was in full."""
    codes = PrecomputedCodes.__new__(PrecomputedCodes)
    codes.folder, codes.field = tmp_path, "image_codes"
    codes.manifest = {"made_from": {"seed": 0}, "pictures": [4, 4]}
    codes.check({"seed": 0, "data.scaled_decoding": False}, (4, 4))
    with pytest.raises(ValueError, match="image_codes: .* data.scaled_decoding=False, this run has True; make it anew"):
        codes.check({"seed": 0, "data.scaled_decoding": True}, (4, 4))
