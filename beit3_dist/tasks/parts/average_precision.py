"""Detections in the pixels of their images, how right they are (COCO's average precision), and as files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from beit3_dist.optional import optional_module
from beit3_dist.tasks.data.object_views import Scaled
from beit3_dist.tasks.data.objects import Marked, bitmap, mask_tools, run_length

COLUMNS = 6
"""Numbers of a detection: x0, y0, x1, y1, score, label."""
SET = 0.5
"""Probability from which a pixel is the object's."""
BRINGS = "pip install -e '.[detection]' brings it"
SIZES = ("", "_small", "_medium", "_large")
"""COCO's: all, less than 32 x 32 pixels, less than 96 x 96, larger."""


@dataclass
class Detections:
    """Of one image, best first."""

    boxes: np.ndarray
    """float64 [n, 4]: x0, y0, x1, y1 in its pixels."""
    scores: np.ndarray
    """float64 [n], in [0, 1]."""
    labels: np.ndarray
    """int64 [n]."""
    masks: list[np.ndarray] | None = None
    """uint8 [height, width] each, 1 where the object is; None: nobody has drawn any."""
    mask_scores: np.ndarray | None = None
    """As `scores`, of the masks."""


def packed(detections: Sequence[Tensor], masks: Tensor | None, most: int) -> Tensor:
    """Detections [n, 6] of B images as one tensor, float32 [B, most, 6], filled up with the label -1; with masks [N, m,
    m] in [0, 1] the bytes of that, and a byte for each place of them, uint8 [B, most, 24 + m * m]."""
    device = detections[0].device
    boxes = torch.zeros(len(detections), most, COLUMNS, device=device)
    boxes[..., 5] = -1
    for row, some in enumerate(detections):
        boxes[row, : len(some)] = some
    if masks is None:
        return boxes
    levels = torch.zeros(len(detections), most, masks.shape[1:].numel(), dtype=torch.uint8, device=device)
    for row, some in enumerate(masks.split([len(some) for some in detections])):
        levels[row, : len(some)] = (some.flatten(1) * 255).round().byte()
    return torch.cat([boxes.view(torch.uint8), levels], 2)


def unpacked_detections(
    row: Tensor, size: tuple[int, int], side: int, with_masks: bool, maskness: bool = False
) -> Detections:
    """What `packed` has of an image of this width and height, seen in a view of `side` pixels, whose longer side the
    image's is. `maskness`: a mask's score is the box's times the mean probability of its pixels."""
    numbers = row[:, : 4 * COLUMNS].contiguous().view(torch.float32) if with_masks else row
    real = numbers[:, 5] >= 0
    found = numbers[real].double().numpy()
    scaled, (width, height) = Scaled.fitting(size, side), size
    boxes = found[:, :4] * np.tile([width / scaled.width, height / scaled.height], 2)
    boxes = boxes.clip(0, np.tile([width, height], 2))
    shown = (boxes[:, 2:] > boxes[:, :2]).all(1)  # not in what fills the view up
    detections = Detections(boxes[shown], found[shown, 4], found[shown, 5].astype(np.int64))
    if with_masks:
        levels = row[real][torch.from_numpy(shown), 4 * COLUMNS :].float() / 255
        m = round(levels.shape[1] ** 0.5)
        inside = levels >= SET
        mean = (levels * inside).sum(1) / inside.sum(1).clamp(min=1)
        detections.masks = [
            pasted(mask, box, width, height) for mask, box in zip(levels.view(-1, m, m), detections.boxes, strict=True)
        ]
        detections.mask_scores = detections.scores * mean.double().numpy() if maskness else detections.scores
    return detections


def pasted(mask: Tensor, box: np.ndarray, width: int, height: int) -> np.ndarray:
    """Probabilities [m, m] in a box as pixels of an image, uint8 [height, width]: bilinear at the centres of pixels."""
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = min(width, int(np.ceil(box[2]))), min(height, int(np.ceil(box[3])))
    x = 2 * (torch.arange(left, right) + 0.5 - box[0]) / (box[2] - box[0]) - 1
    y = 2 * (torch.arange(top, bottom) + 0.5 - box[1]) / (box[3] - box[1]) - 1
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].float()
    whole = np.zeros((height, width), dtype=np.uint8)
    whole[top:bottom, left:right] = (grid_sample(mask[None, None], places, align_corners=False)[0, 0] >= SET).numpy()
    return whole


def truth_of(marked: Marked) -> Detections:
    """What an index says of an image, as if it had been found in it."""
    objects = [one for one in marked.objects or () if not one.get("crowd")]
    corners = np.array([one["box"] for one in objects], dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    labels = np.array([one["label"] for one in objects], dtype=np.int64)
    masks = None
    if objects and all("mask" in one for one in objects):
        masks = [bitmap(one["mask"], marked.height, marked.width) for one in objects]
    return Detections(corners, np.ones(len(objects)), labels, masks)


def results(
    found: Sequence[Detections], images: Sequence[int], categories: Sequence[int], masks: bool
) -> list[dict[str, Any]]:
    """As COCO takes them: a record for each box, or for each mask. `categories`: number of each label."""
    records = []
    for image, some in zip(images, found, strict=True):
        for place, label in enumerate(some.labels.tolist()):
            record: dict[str, Any] = {"image_id": image, "category_id": categories[label]}
            if masks:
                assert some.masks is not None and some.mask_scores is not None
                code = mask_tools().encode(np.asfortranarray(some.masks[place]))
                record["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
                record["score"] = float(some.mask_scores[place])
            else:
                x0, y0, x1, y1 = some.boxes[place].tolist()
                record |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": float(some.scores[place])}
            records.append(record)
    return records


def write_detections(
    folder: Path, found: Sequence[Detections], images: Sequence[int], categories: Sequence[int], masks: bool
) -> None:
    """boxes.json, and masks.json where there are masks: COCO's format of results."""
    for name, of_masks in (("boxes", False), ("masks", True))[: 1 + masks]:
        listed = results(found, images, categories, of_masks)
        (folder / f"{name}.json").write_text(json.dumps(listed) + "\n", encoding="utf-8")


def average_precision(
    truths: Sequence[Marked], found: Sequence[Detections], classes: int, most: int, masks: bool
) -> dict[str, float]:
    """ap (mean over overlaps of .5 to .95), ap50, ap75, ap_small, ap_medium, ap_large and ar (recall of the `most` best
    of an image) of boxes or masks, by pycocotools; those without any object are left out.

    Where a data set has marked but some classes in an image, as LVIS, others do not count there, and where it has not
    marked all objects of one, what is none of the marked ones does not count either.
    """
    tools: Any = optional_module("pycocotools.coco", "average precision", BRINGS)
    evaluation: Any = optional_module("pycocotools.cocoeval", "average precision", BRINGS)
    kind, name = ("segm", "mask") if masks else ("bbox", "box")
    ours = results(found, range(1, len(found) + 1), range(1, classes + 1), masks)
    ours = [one for one in ours if one["category_id"] - 1 in _judged(truths[one["image_id"] - 1], classes)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = tools.COCO()
        truth.dataset = {
            "images": [{"id": n, "width": t.width, "height": t.height} for n, t in enumerate(truths, start=1)],
            "categories": [{"id": label + 1} for label in range(classes)],
            "annotations": list(_annotations(truths, masks)),
        }
        truth.createIndex()
        guesses = truth.loadRes(ours) if ours else tools.COCO()
        run = evaluation.COCOeval(truth, guesses, kind)
        run.params.maxDets = [1, 10, most]
        run.evaluate()
        run.accumulate()
    precision, recall = run.eval["precision"][..., -1], run.eval["recall"][..., -1]  # [T, R, K, A], [T, K, A]
    overlap = {round(100 * threshold): place for place, threshold in enumerate(run.params.iouThrs)}
    values = {f"ap{suffix}": precision[..., size] for size, suffix in enumerate(SIZES)}
    values |= {"ap50": precision[overlap[50], ..., 0], "ap75": precision[overlap[75], ..., 0], "ar": recall[..., 0]}
    return {f"{name}_{n}": float(v[v > -1].mean()) for n, v in values.items() if (v > -1).any()}


def _judged(marked: Marked, classes: int) -> set[int]:
    """Labels that count in an image."""
    if not marked.absent and not marked.unfinished:
        return set(range(classes))
    return {one["label"] for one in marked.objects or ()} | {*marked.absent, *marked.unfinished}


def _annotations(truths: Sequence[Marked], masks: bool) -> Any:
    number = 0
    for image, marked in enumerate(truths, start=1):
        whole = [0, 0, marked.width, marked.height]
        objects = [*(marked.objects or ())]
        # What is matched to a crowd does not count: one over the whole image takes what is no marked object's.
        objects += [{"label": label, "box": whole, "crowd": True} for label in marked.unfinished]
        for one in objects:
            number += 1  # from 1: pycocotools takes 0 for no match
            annotation = {
                "id": number, "image_id": image, "category_id": one["label"] + 1, "bbox": one["box"],
                "iscrowd": int(bool(one.get("crowd"))), "area": one.get("area", one["box"][2] * one["box"][3]),
            }  # fmt: skip
            if masks:
                mask = one.get("mask", [[0, 0, marked.width, 0, marked.width, marked.height, 0, marked.height]])
                annotation["segmentation"] = run_length(mask, marked.height, marked.width)
            yield annotation
