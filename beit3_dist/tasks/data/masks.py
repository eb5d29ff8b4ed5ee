"""Images with a class for each pixel: their masks, and indexes of folders of pictures and masks.

A line of an index: {"image_path", "mask_path", "nothing", "first"}. A mask is a picture of numbers, one a pixel, as
large as its image: `nothing` is that of pixels that count for nothing, `first` that of class 0 (ADE20K: 0 and 1; most
others: 255 and 0). What is only predicted may have no mask_path.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from beit3_dist.config import DataConfig, require
from beit3_dist.data.faults import BadSample
from beit3_dist.data.kinds import LeftOut, folders_in, images_in
from beit3_dist.data.text_files import read_lines
from beit3_dist.data.transforms import read_image
from beit3_dist.tasks.data.benchmarks import Indexes, Records
from beit3_dist.tasks.data.examples import Example, Record, Rules, first_of, integer
from beit3_dist.tasks.data.names import check_names

NOTHING = -1
"""Label of pixels that count for nothing."""
FORMATS = ("PNG", "BMP", "TIFF", "GIF")
"""What masks are read of: what keeps numbers as they are."""
ADE20K_NAMES = "objectInfo150.txt"
MASK_FOLDERS = ("annotations", "masks")


@dataclass(frozen=True, slots=True)
class Mask:
    """Where the classes of an example's pixels lie."""

    path: Path | None
    """None: nobody knows them."""
    nothing: int
    first: int


def read_masked(number: int, record: Record, rules: Rules) -> Example:
    """The example of a line. Raises Malformed."""
    (image,) = rules.paths(record, "image_path")
    path = None
    if rules.train or "mask_path" in record:
        (path,) = rules.paths(record, "mask_path")
    label = Mask(path, integer(record, "nothing"), integer(record, "first"))
    return Example(number, (image,), None, label, Path(record["image_path"]).with_suffix("").as_posix())


def labels_of(mask: Mask, size: tuple[int, int], classes: int | None) -> np.ndarray:
    """int16 [H, W]: the class of each pixel, or `NOTHING`. `size`: the image's width and height. `classes`: how many
    there are; None: nobody knows. Raises BadSample naming the file where there is no such mask."""
    if mask.path is None:
        return np.full(size[::-1], NOTHING, np.int16)
    try:
        with Image.open(mask.path, formats=FORMATS) as picture:
            if picture.size != size:
                there, wanted = (f"{w} x {h}" for w, h in (picture.size, size))
                raise BadSample(f"the mask {mask.path} has {there} pixels, its image {wanted}")
            numbers = np.asarray(picture).astype(np.int32)
    except BadSample:
        raise
    except Exception as error:  # broken files make Pillow raise nearly anything
        raise BadSample(f"the mask {mask.path} cannot be read: {error}") from None
    if numbers.ndim != 2:
        raise BadSample(f"the mask {mask.path} has {numbers.shape[2]} channels, and a mask has a number for each pixel")
    labels = np.where(numbers == mask.nothing, NOTHING, numbers - mask.first)
    end = np.iinfo(np.int16).max if classes is None else classes
    wrong = (labels != NOTHING) & ((labels < 0) | (labels >= end)) | (numbers < mask.first) & (numbers != mask.nothing)
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        raise BadSample(
            f"the mask {mask.path} has {numbers[y, x]} at pixel ({x}, {y}): classes are {mask.first} to "
            f"{mask.first + end - 1}, and nothing is {mask.nothing}"
        )
    return labels.astype(np.int16)


# -------------------------------------------------------------------------------------------------------------- indexes


def ade20k(folder: Path, left_out: LeftOut) -> tuple[Indexes, list[str]]:
    """ADE20K's challenge data (ADEChallengeData2016) and the names of its 150 classes."""
    path = folder / ADE20K_NAMES
    require(path.is_file(), f"there is no file {path}")
    _, *lines = read_lines(path)  # the first names the columns
    names = [(f"{path}, line {number}", line.split("\t")[-1].strip()) for number, line in lines if line.strip()]
    check_names(names)
    return masked_images(folder, len(names), 0, 1, left_out), [name for _, name in names]


def masked_images(folder: Path, classes: int, nothing: int, first: int, left_out: LeftOut) -> Indexes:
    """An index of each side, the folders of FOLDER/images: images/SIDE/NAME.jpg has its mask in annotations/SIDE or
    masks/SIDE, as NAME.png. A side without a folder of masks is only to be predicted. Every mask is read.

    Raises ValueError that counts all faults and names the first: a mask that is missing, cannot be read, is of another
    size than its image, or has a class that is not there."""
    require((folder / "images").is_dir(), f"there is no folder {folder / 'images'}")
    root = next((name for name in MASK_FOLDERS if (folder / name).is_dir()), None)
    require(root is not None, f"there is no folder {folder / MASK_FOLDERS[0]}, nor {folder / MASK_FOLDERS[1]}")
    indexes: Indexes = {}
    faults: list[str] = []
    for side in folders_in(folder / "images", left_out):
        records: Records = [
            {"image_path": f"images/{side}/{name}", "nothing": nothing, "first": first}
            for name in images_in(folder / "images" / side, left_out)
        ]
        if (folder / f"{root}" / side).is_dir():
            for record in records:
                record["mask_path"] = f"{root}/{side}/{Path(record['image_path']).stem}.png"
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                faults += [fault for fault in pool.map(partial(_fault, folder, classes), records) if fault]
        indexes[f"segmentation.{side}.jsonl"] = records
    require(bool(indexes), f"{folder / 'images'} has no folder, of which each is a side, such as training")
    if faults:
        raise ValueError(f"{len(faults)} faults in the masks of {folder}: {first_of(faults)}")
    return indexes


def _fault(folder: Path, classes: int, record: Record) -> str:
    """What is wrong with the mask of a record; empty where nothing is."""
    image = folder / record["image_path"]
    mask = Mask(folder / record["mask_path"], record["nothing"], record["first"])
    if not (folder / record["mask_path"]).is_file():
        return f"{image}: there is no mask {mask.path}"
    try:
        labels_of(mask, read_image(image, DataConfig.max_pixels).size, classes)
    except (BadSample, OSError) as bad:
        return f"{image}: {getattr(bad, 'strerror', None) or bad}"
    return ""
