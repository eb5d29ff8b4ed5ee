"""Average precision by hand and against pycocotools' own summary; detections in their image's pixels."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from beit3_dist.tasks.data.objects import Marked
from beit3_dist.tasks.parts.average_precision import (
    Detections,
    average_precision,
    packed,
    pasted,
    results,
    unpacked_detections,
    write_detections,
)
from beit3_dist.tasks.parts.drawing import colour_of, with_objects

SIDE = 100


def rectangle(box: list[float]) -> dict[str, Any]:
    left, top, width, height = box
    right, bottom = left + width, top + height
    return {"box": box, "mask": [[left, top, right, top, right, bottom, left, bottom]]}


def marked(*objects: tuple[int, list[float]], **more: Any) -> Marked:
    return Marked(SIDE, SIDE, tuple({"label": label, **rectangle(box)} for label, box in objects), **more)


def found(*of: tuple[int, float, list[float]]) -> Detections:
    boxes = np.array([[x, y, x + w, y + h] for _, _, (x, y, w, h) in of], dtype=np.float64).reshape(-1, 4)
    scores = np.array([score for _, score, _ in of])
    masks = []
    for box in boxes.astype(int).tolist():
        masks.append(np.zeros((SIDE, SIDE), np.uint8))
        masks[-1][box[1] : box[3], box[0] : box[2]] = 1
    return Detections(boxes, scores, np.array([label for label, _, _ in of], dtype=np.int64), masks, scores)


@pytest.mark.parametrize(("masks", "name"), [(False, "box"), (True, "mask")])
def test_by_hand(masks: bool, name: str) -> None:
    """One class, two objects. The best guess is right to 1, the second is wrong, the third is right to .8: precision is
    1 up to half of all objects, then 2 / 3 up to all (overlaps of .5 to .8), or nothing. Of 101 levels of recall, 0 to
    .5 are 51."""
    truths = [marked((0, [10, 10, 20, 20])), marked((0, [40, 40, 20, 20]))]
    guesses = [found((0, 0.9, [10, 10, 20, 20]), (0, 0.8, [70, 70, 20, 20])), found((0, 0.7, [40, 40, 20, 16]))]
    scores = average_precision(truths, guesses, 1, 100, masks)
    loose, strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert scores == pytest.approx({
        f"{name}_ap": (7 * loose + 3 * strict) / 10, f"{name}_ap50": loose, f"{name}_ap75": loose,
        f"{name}_ap_small": (7 * loose + 3 * strict) / 10, f"{name}_ar": (7 * 1 + 3 * 0.5) / 10,
    })  # fmt: skip


def test_it_is_pycocotools_summary_on_random_guesses() -> None:
    rng = np.random.default_rng(0)

    def box() -> list[float]:
        left, top = (float(v) for v in rng.integers(0, 60, 2))
        return [left, top, *(float(v) for v in rng.integers(4, 40, 2))]

    truths = [marked(*((int(rng.integers(3)), box()) for _ in range(int(rng.integers(0, 6))))) for _ in range(12)]
    guesses = []
    for truth in truths:
        near = [(o["label"], float(rng.random()), [v + float(rng.integers(-2, 3)) for v in o["box"][:2]] + o["box"][2:])
                for o in truth.objects or ()]  # fmt: skip
        guesses.append(found(*near, *((int(rng.integers(3)), float(rng.random()), box()) for _ in range(3))))
    ours = average_precision(truths, guesses, 3, 100, masks=False)
    annotations = [
        {"id": 1 + n, "image_id": image, "category_id": o["label"] + 1, "bbox": o["box"], "iscrowd": 0,
         "area": o["box"][2] * o["box"][3]}
        for n, (image, o) in enumerate((i, o) for i, t in enumerate(truths, 1) for o in t.objects or ())
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        official = COCO()
        official.dataset = {"images": [{"id": n + 1} for n in range(12)], "annotations": annotations,
                            "categories": [{"id": n + 1} for n in range(3)]}  # fmt: skip
        official.createIndex()
        run = COCOeval(official, official.loadRes(results(guesses, range(1, 13), range(1, 4), False)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    named = ["ap", "ap50", "ap75", "ap_small", "ap_medium"]
    assert [ours[f"box_{name}"] for name in named] == pytest.approx(run.stats[: len(named)].tolist())
    assert ours["box_ar"] == pytest.approx(run.stats[8]) and 0.1 < ours["box_ap"] < 0.9


def test_nothing_found_and_nothing_there() -> None:
    assert average_precision([marked((0, [1, 1, 9, 9]))], [found()], 2, 100, False)["box_ap"] == 0
    assert average_precision([marked()], [found()], 2, 100, False) == {}


def test_lvis_judges_what_it_has_marked() -> None:
    """Class 1 is not judged; class 0 is known to be absent; not all of class 2 are marked."""
    truths = [marked((2, [10, 10, 20, 20]), absent=(0,), unfinished=(2,)), marked((0, [5, 5, 9, 9]))]
    guesses = [
        found((1, 0.95, [50, 50, 9, 9]), (2, 0.9, [60, 60, 20, 20]), (2, 0.8, [10, 10, 20, 20])),
        found((0, 0.9, [5, 5, 9, 9])),
    ]
    assert average_precision(truths, guesses, 3, 300, False)["box_ap"] == pytest.approx(1)
    absent = found((0, 0.95, [50, 50, 9, 9]))
    assert average_precision([truths[0], truths[1]], [absent, guesses[1]], 3, 300, False)["box_ap"] < 0.6


@pytest.mark.parametrize("maskness", [False, True])
def test_detections_return_to_their_images(maskness: bool) -> None:
    """A view of 64 pixels of an image of 200 x 100: 64 x 32 are the image's, the rest is what fills it up."""
    rows = torch.tensor([[16.0, 8, 48, 24, 0.9, 2], [0, 40, 64, 60, 0.8, 1], [0, 0, 64, 64, 0.7, 0]])
    masks = torch.tensor([1.0, 1.0, 0.75])[:, None, None].expand(3, 28, 28)
    boxes, with_masks = packed([rows[:0], rows], None, 5), packed([rows[:0], rows], masks, 5)
    assert boxes.shape == (2, 5, 6) and with_masks.shape == (2, 5, 24 + 784) and with_masks.dtype == torch.uint8
    empty = packed([rows[:0], rows[:0]], masks[:0], 5)
    assert empty.shape == (2, 5, 24 + 784)  # so that ranks' tensors fit together
    for predictions, drawn in ((boxes, False), (with_masks, True)):
        assert len(unpacked_detections(predictions[0], (200, 100), 64, drawn).labels) == 0
        got = unpacked_detections(predictions[1], (200, 100), 64, drawn, maskness)
        assert got.boxes.tolist() == [[50, 25, 150, 75], [0, 0, 200, 100]]
        assert got.labels.tolist() == [2, 0] and got.scores.tolist() == pytest.approx([0.9, 0.7])
    assert got.masks is not None  # but for the rounded corners
    assert [mask.sum() for mask in got.masks] == pytest.approx([100 * 50, 200 * 100], rel=0.05)
    assert got.mask_scores is not None
    assert got.mask_scores.tolist() == pytest.approx([0.9, 0.7 * 0.75 if maskness else 0.7], rel=1e-2)


def test_masks_are_pasted_at_the_centres_of_pixels() -> None:
    half = torch.zeros(28, 28)
    half[:, :14] = 1  # the left half
    got = pasted(half, np.array([10.0, 20, 66, 48]), 80, 60)
    expected = np.zeros((60, 80), np.uint8)
    expected[20:48, 10:38] = 1
    assert np.array_equal(got, expected)
    assert pasted(half, np.array([10.2, 20.9, 10.7, 21.4]), 80, 60).shape == (60, 80)


def test_files_are_cocos_and_pictures_show_them(tmp_path: Path) -> None:
    one = found((1, 0.9, [10, 10, 30, 20]), (0, 0.2, [50, 50, 9, 9]))
    write_detections(tmp_path, [one], [42], [3, 7], masks=True)
    boxes, masks = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("boxes", "masks"))
    assert boxes[0] == {"image_id": 42, "category_id": 7, "bbox": [10, 10, 30, 20], "score": 0.9}
    assert masks[0]["segmentation"]["size"] == [SIDE, SIDE] and isinstance(masks[0]["segmentation"]["counts"], str)
    picture = np.array(with_objects(Image.new("RGB", (SIDE, SIDE), "white"), one, ["cat", "dog"]))
    assert tuple(picture[10, 15]) == colour_of(1) and tuple(picture[29, 39]) != (255, 255, 255)
    assert (picture[50:60, 50:60] == 255).all()  # too unsure
    assert (picture[25, 30] < 255).any()  # the mask
