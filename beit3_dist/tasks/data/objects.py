"""Images with boxes and masks of objects: lines of their index.

A line of an index: {"image_path", "image_id", "width", "height", "objects"}, the latter a list of {"id", "box": [left,
top, width, height], "label", "area"} and, where there are any, "mask": polygons [[x, y, x, y, ...], ...] or COCO's
run-length code {"size", "counts"}, and "crowd": true for many in one box, from which nobody learns. A test server's
images have no "objects". LVIS adds "absent" and "unfinished": labels that are known not to be there, or whose objects
are not all marked. `tools/build_index.py boxes` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from beit3_dist.optional import optional_module
from beit3_dist.tasks.data.examples import Example, Malformed, Record, Rules, integer

ROUNDING = 1.0
"""Pixels by which a box may stick out of its image; it is cut then."""


@dataclass(frozen=True, slots=True)
class Marked:
    """What an index says of an image."""

    width: int
    height: int
    objects: tuple[Record, ...] | None
    """None: nobody tells."""
    absent: tuple[int, ...] = ()
    unfinished: tuple[int, ...] = ()


def mask_tools() -> Any:
    """COCO's code of masks. Raises ValueError where the package is missing."""
    return optional_module("pycocotools.mask", "masks and average precision", "pip install -e '.[detection]' brings it")


def check_mask(mask: Any, height: int, width: int) -> None:
    """Raises Malformed where what an index has is no mask of an image of this size; nothing is drawn."""
    if isinstance(mask, list):
        if not mask or not all(isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 for ring in mask):
            raise Malformed("its mask has a polygon of less than three points")
        if not all(type(place) in (int, float) and isfinite(place) for ring in mask for place in ring):
            raise Malformed("its mask has a point that is no place")
        return
    size, counts = (mask.get("size"), mask.get("counts")) if isinstance(mask, dict) else (None, None)
    if size != [height, width]:
        raise Malformed(f"its mask is of {size} pixels, the image of {[height, width]}: rows and columns")
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != height * width:
            raise Malformed("its mask's runs do not add up to the image")
    elif not isinstance(counts, str):
        raise Malformed("its mask has neither polygons nor counts")


def run_length(mask: Any, height: int, width: int) -> Any:
    """A mask that `check_mask` takes, in pycocotools' run-length code."""
    if isinstance(mask, list):
        return mask_tools().merge(mask_tools().frPyObjects(mask, height, width))
    if isinstance(mask["counts"], list):
        return mask_tools().frPyObjects(mask, height, width)
    return {"size": mask["size"], "counts": mask["counts"].encode()}


def bitmap(mask: Any, height: int, width: int) -> np.ndarray:
    """uint8 [height, width]."""
    return mask_tools().decode(run_length(mask, height, width))


def box_of(mask: np.ndarray) -> np.ndarray:
    """The box x0, y0, x1, y1 around what is set in a mask [H, W]; zeros where nothing is."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return np.zeros(4, dtype=np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)


def runs_of(mask: np.ndarray) -> dict[str, Any]:
    """A mask bool [H, W] as an index may have it: lengths of runs, column by column, in turn outside and inside."""
    line = mask.T.reshape(-1).astype(bool)
    ends = [*(np.flatnonzero(line[1:] != line[:-1]) + 1).tolist(), len(line)]
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return {"size": list(mask.shape), "counts": [0, *lengths] if line[0] else lengths}


def cut_box(box: Any, width: int, height: int) -> list[float]:
    """A box [left, top, width, height] within its image. Raises Malformed where it is empty or sticks out."""
    numbers = isinstance(box, list) and len(box) == 4 and all(type(side) in (int, float) for side in box)
    if not numbers or not all(map(isfinite, box)):
        raise Malformed("its box is no list of four numbers")
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if box[2] <= 0 or box[3] <= 0:
        raise Malformed(f"its box {box} is empty")
    if min(left, top) < -ROUNDING or right > width + ROUNDING or bottom > height + ROUNDING:
        raise Malformed(f"its box {box} sticks out of the image of {width} x {height} pixels")
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if left >= right or top >= bottom:
        raise Malformed(f"its box {box} is outside of the image of {width} x {height} pixels")
    return [left, top, right - left, bottom - top]


def read_marked(number: int, record: Record, rules: Rules, masks: bool) -> Example:
    """The example of a line. `masks`: whether every object needs one. Raises Malformed."""
    (path,) = rules.paths(record, "image_path")
    width, height = (integer(record, side) for side in ("width", "height"))
    if min(width, height) < 1:
        raise Malformed(f"an image of {width} x {height} pixels")
    given = record.get("objects")
    if given is None and rules.train:
        raise Malformed("no objects to learn from in the field 'objects'")
    if given is not None:
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            raise Malformed("the field 'objects' is no list of objects")
        for place, one in enumerate(given):
            try:
                integer(one, "label", rules.classes)
                one["box"] = cut_box(one.get("box"), width, height)
                if masks and "mask" not in one:
                    raise Malformed("it has no mask")
                if masks:
                    check_mask(one["mask"], height, width)
            except Malformed as reason:
                raise Malformed(f"object {one.get('id', place)}: {reason}") from None
    absent, unfinished = (tuple(record.get(field, ())) for field in ("absent", "unfinished"))
    marked = Marked(width, height, None if given is None else tuple(given), absent, unfinished)
    return Example(number, (path,), None, marked, str(integer(record, "image_id")))
