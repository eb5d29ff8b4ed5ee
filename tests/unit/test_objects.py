"""Boxes and masks move with their image, what an index says of them is checked; JSON of COCO, LVIS and Objects365."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from beit3_dist.data.faults import BadSample
from beit3_dist.data.order import generator
from beit3_dist.tasks.data.examples import Example, Malformed, Rules
from beit3_dist.tasks.data.marked import category_ids
from beit3_dist.tasks.data.names import read_names
from beit3_dist.tasks.data.object_views import ObjectViews, Scaled, Seen, objects_of, unpacked
from beit3_dist.tasks.data.objects import Marked, bitmap, box_of, check_mask, read_marked, runs_of
from beit3_dist.tasks.registry import task_class
from tools import build_index

WIDTH, HEIGHT, SIDE = 60, 40, 64
RECTANGLE = (12, 8, 33, 29)
"""x0, y0, x1, y1 of what is red in the picture, of which each pixel is in."""


def polygon(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def marked(*rectangles: tuple[float, float, float, float], **more: Any) -> Marked:
    objects = [
        {"id": n, "label": n, "box": [x0, y0, x1 - x0, y1 - y0], "mask": polygon(x0, y0, x1, y1), **more}
        for n, (x0, y0, x1, y1) in enumerate(rectangles)
    ]
    return Marked(WIDTH, HEIGHT, tuple(objects))


@pytest.fixture
def image() -> Image.Image:
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    x0, y0, x1, y1 = RECTANGLE
    ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill="red")
    return picture


@pytest.mark.parametrize("masks", [False, True])
def test_boxes_and_masks_lie_where_the_picture_shows_them(image: Image.Image, masks: bool) -> None:
    """A pixel or two off at most, since colours are interpolated; over scales, corners and mirrored views."""
    views = ObjectViews(scales=(0.2, 4.0), masks=masks)
    example = Example(0, (Path("a.png"),), None, marked(RECTANGLE), "7")
    shown = hidden = 0
    for key in range(60):
        ours, (view,) = views.of_training(example, [image], SIDE, iter([generator(key)]))
        seen = ours.label
        red = (view[..., 0] > 192) & (view[..., 1] < 128)
        assert view.shape == (SIDE, SIDE, 3) and ours.name == "7"
        if not len(seen.labels):
            hidden += 1
            assert red.sum() <= SIDE  # a line at most
            continue
        shown += 1
        np.testing.assert_allclose(seen.boxes[0], box_of(red), atol=2)
        assert seen.labels.tolist() == [0] and (seen.boxes >= 0).all() and (seen.boxes <= SIDE).all()
        if masks:
            mask = unpacked(torch.from_numpy(seen.masks), SIDE)[0].bool().numpy()
            assert (mask != red).sum() <= red.sum() * 0.15 + 2 * SIDE
            np.testing.assert_array_equal(seen.boxes[0], box_of(mask))
    assert shown > 40 and hidden > 0
    again = [views.of_training(example, [image], SIDE, iter([generator(5)]))[1][0] for _ in range(2)]
    assert np.array_equal(*again)


def test_a_scaled_view_by_hand(image: Image.Image) -> None:
    scaled = Scaled.fitting((WIDTH, HEIGHT), 30)
    assert (scaled.width, scaled.height) == (30, 20) and scaled.shown(30) == (30, 20)
    boxes = np.array([[12.0, 8, 33, 29]])
    assert scaled.boxes(boxes.copy(), (WIDTH, HEIGHT), 30).tolist() == [[6, 4, 16.5, 14.5]]
    cut = replace(Scaled.fitting((WIDTH, HEIGHT), 30, 2.0), left=10, top=4, mirrored=True)  # 60 x 40, of which 30 x 30
    assert cut.boxes(boxes.copy(), (WIDTH, HEIGHT), 30).tolist() == [[17, 4, 30, 25]]
    view = ObjectViews().evaluate(image, 30)
    assert (view[20:] == 128).all() and (view[:20] != 128).any()


def test_crowds_are_not_learnt_and_slivers_are_gone(image: Image.Image) -> None:
    views = ObjectViews(scales=(1.0, 1.0), horizontal_flip=0, masks=True)
    whole = marked(RECTANGLE, (0, 0, 10, 10))
    crowd = replace(whole, objects=(whole.objects[0], whole.objects[1] | {"crowd": True}))  # type: ignore[index]
    example = Example(0, (Path("a.png"),), None, crowd, "7")
    ours, _ = views.of_training(example, [image], SIDE, iter([generator(0)]))
    assert ours.label.labels.tolist() == [0]
    with pytest.raises(BadSample, match="60 x 39 pixels, and its index says 60 x 40"):
        views.of_training(example, [image.crop((0, 0, WIDTH, HEIGHT - 1))], SIDE, iter([generator(0)]))


def test_a_batch_holds_uneven_numbers() -> None:
    def seen(count: int) -> Example:
        masks = np.packbits(np.ones((count, 12, 12), np.uint8), axis=2)
        return Example(0, (), None, Seen(np.ones((count, 4), np.float32), np.arange(count), masks), "")

    batch = objects_of([seen(2), seen(0), seen(3)])
    assert batch.labels.tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 2]]
    assert batch.boxes.shape == (3, 3, 4) and unpacked(batch.masks[2], 12).sum() == 3 * 144
    empty = objects_of([seen(0), seen(0)])
    assert empty.boxes.shape == (2, 0, 4) and empty.masks.shape[:2] == (2, 0)


def test_masks_of_all_forms_are_one() -> None:
    by_hand = np.zeros((HEIGHT, WIDTH), np.uint8)
    x0, y0, x1, y1 = RECTANGLE
    by_hand[y0:y1, x0:x1] = 1
    for mask in (polygon(*RECTANGLE), runs_of(by_hand)):
        assert np.array_equal(bitmap(mask, HEIGHT, WIDTH), by_hand)
    assert runs_of(np.array([[1, 0], [1, 1]])) == {"size": [2, 2], "counts": [0, 2, 1, 1]}
    everything = runs_of(np.ones((3, 4)))
    check_mask(everything, 3, 4)
    assert bitmap(everything, 3, 4).all() and not bitmap(runs_of(np.zeros((3, 4))), 3, 4).any()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({"label": 3}, r"object 5: label 3 is not in range\(3\)"),
    "a class of another kind": ({"label": "cat"}, "object 5: no integer in the field 'label'"),
    "no box": ({"box": None}, "object 5: its box is no list of four numbers"),
    "an empty box": ({"box": [1, 1, 0, 4]}, r"object 5: its box \[1, 1, 0, 4\] is empty"),
    "a box that sticks out": ({"box": [50, 1, 20, 4]}, "sticks out of the image of 60 x 40 pixels"),
    "a box outside": ({"box": [60.5, 1, 0.2, 4]}, "is outside of the image of 60 x 40 pixels"),
    "no number": ({"box": [float("nan"), 1, 20, 4]}, "no list of four numbers"),
    "no mask": ({"mask": "?"}, "object 5: its mask is of None pixels"),
    "two points": ({"mask": [[1, 1, 2, 2]]}, "object 5: its mask has a polygon of less than three points"),
    "another image's": ({"mask": {"size": [9, 9], "counts": "a"}}, r"its mask is of \[9, 9\] pixels, the image of"),
    "runs": ({"mask": {"size": [40, 60], "counts": [3, 4]}}, "its mask's runs do not add up to the image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_an_object_is_said(fault: str) -> None:
    changes, said = FAULTS[fault]
    one = {"id": 5, "label": 0, "box": [1, 1, 20, 4], "mask": polygon(1, 1, 21, 5)} | changes
    record = {"image_path": "a.png", "image_id": 1, "width": WIDTH, "height": HEIGHT, "objects": [one]}
    rules = Rules(task_class("instance_segmentation"), ".", True, None, 3)
    with pytest.raises(Malformed, match=said):
        read_marked(0, record, rules, masks=True)


def test_a_box_that_was_rounded_is_cut_and_test_images_have_none() -> None:
    record = {"image_path": "a.png", "image_id": 1, "width": WIDTH, "height": HEIGHT}
    rules = Rules(task_class("detection"), ".", False, None, 3)
    assert read_marked(0, record, rules, False).label.objects is None
    with pytest.raises(Malformed, match="no objects to learn from"):
        read_marked(0, record, replace(rules, train=True), False)
    one = {"id": 5, "label": 0, "box": [-0.5, 1, 61, 4]}
    assert read_marked(0, record | {"objects": [one]}, rules, False).label.objects[0]["box"] == [0, 1, 60, 4]
    with pytest.raises(Malformed, match="object 5: it has no mask"):
        read_marked(0, record | {"objects": [one]}, rules, True)


# ----------------------------------------------------------------------------------------------------------- index step


def content() -> dict[str, Any]:
    """COCO's form: two images, three objects, categories with a gap."""
    images = [{"id": 10 + n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in range(3)]
    box = {"bbox": [1.0, 2.0, 10.0, 5.0], "segmentation": polygon(1, 2, 11, 7), "area": 50.0, "iscrowd": 0}
    crowd = {"bbox": [0, 0, 60, 40], "segmentation": {"size": [40, 60], "counts": [0, 2400]}, "iscrowd": 1}
    return {
        "images": images,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 100, "image_id": 10, "category_id": 7, **box},
            {"id": 101, "image_id": 11, "category_id": 3, **box},
            {"id": 102, "image_id": 11, "category_id": 7, **crowd},
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for side in ("train2017", "val2017"):
        (tmp_path / "images" / side).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / side / f"{n}.png")
    return tmp_path


def build(folder: Path, files: dict[str, dict[str, Any]], *more: str) -> None:
    for name, written in files.items():
        (folder / name).write_text(json.dumps(written))
    sources = [str(folder / name) for name in files]
    build_index.main(["boxes", *sources, str(folder / "out"), "--images", str(folder / "images"), *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_coco(folder: Path) -> None:
    build(folder, {"instances_train2017.json": content(), "instances_val2017.json": content(),
                   "image_info_val2017.json": {n: v for n, v in content().items() if n != "annotations"}})  # fmt: skip
    train, val = (lines(folder / "out" / f"instances_{side}2017.jsonl") for side in ("train", "val"))
    assert [len(train), len(val)] == [2, 3]  # nothing is to be learnt of an image without objects
    assert val[0] == {
        "image_path": "val2017/0.png", "image_id": 10, "width": 60, "height": 40,
        "objects": [{"id": 100, "box": [1, 2, 10, 5], "label": 1, "area": 50, "mask": polygon(1, 2, 11, 7)}],
    }  # fmt: skip
    assert val[1]["objects"][1]["crowd"] is True and val[2]["objects"] == []
    assert all("objects" not in line for line in lines(folder / "out" / "image_info_val2017.jsonl"))
    assert read_names(folder / "out" / "classes.jsonl") == ["cat", "dog"]
    assert category_ids(folder / "out" / "classes.jsonl") == [3, 7]
    rules = Rules(task_class("instance_segmentation"), str(folder / "images"), True, None, 2)
    assert [len(read_marked(0, line, rules, True).label.objects) for line in train] == [1, 2]


def test_lvis_and_objects365(folder: Path) -> None:
    lvis, objects = content(), content()
    for n, image in enumerate(lvis["images"]):
        del image["file_name"]
        image["coco_url"] = f"http://images.example/train2017/{n}.png"
        image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [7]}
    build(folder, {"lvis_v1_train.json": lvis})
    assert lines(folder / "out" / "lvis_v1_train.jsonl")[0].items() >= {
        "image_path": "train2017/0.png", "absent": [0], "unfinished": [1]}.items()  # fmt: skip
    for n, image in enumerate(objects["images"]):
        image["file_name"] = f"images/v1/train2017/{n}.png"
    for annotation in objects["annotations"]:
        del annotation["segmentation"]
    build(folder, {"zhiyuan_objv2_train.json": objects})
    record = lines(folder / "out" / "zhiyuan_objv2_train.jsonl")[0]
    assert record["image_path"] == "train2017/0.png" and "mask" not in record["objects"][0]


WRONG: dict[str, tuple[Any, str]] = {
    "a box outside": (("annotations", 1, "bbox", [55, 1, 20, 5]), "annotation 101: its box .* sticks out of the image"),
    "an empty box": (("annotations", 1, "bbox", [5, 1, 0, 5]), "annotation 101: its box .* is empty"),
    "an empty mask": (("annotations", 0, "segmentation", polygon(3, 3, 3, 3)), "annotation 100: its mask is empty"),
    "no mask": (("annotations", 0, "segmentation", []), "annotation 100: its mask is empty"),
    "a wrong class": (("annotations", 2, "category_id", 9), "annotation 102: there is no category 9"),
    "no image": (("annotations", 0, "image_id", 99), "annotation 100: there is no image 99"),
    "a missing file": (("images", 1, "file_name", "9.png"), "image 11: there is no file .*9.png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_faults_are_named_by_file_and_number(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table, place, field, value), said = WRONG[case]
    faulty = deepcopy(content())
    faulty[table][place][field] = value
    with pytest.raises(SystemExit) as stop:
        build(folder, {"instances_val2017.json": faulty})
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "1 faults: " in line and "--leave-out-faulty leaves them out" in line
    assert re.search(f"instances_val2017.json, {said}", line)
    build(folder, {"instances_val2017.json": faulty}, "--leave-out-faulty")
    assert "left out 1: " in capsys.readouterr().err
    found = lines(folder / "out" / "instances_val2017.jsonl")
    assert sum(len(line["objects"]) for line in found) == (1 if table == "images" else 2)


def test_other_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = content() | {"categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "wolf"}]}
    nowhere = content()
    nowhere["images"][0]["file_name"] = "no/where.png"
    cases = [({"a_val2017.json": content(), "b_val2017.json": other}, "b_val2017.json has other categories than"),
             ({"a_val2017.json": nowhere}, "there is no file in .* of the names no/where.png, .*: see --images"),
             ({"a_val2017.json": {"images": []}}, "is not in the official format: KeyError: 'categories'"),
             ({"a_val2017.json": content() | {"images": []}}, "official format: it has no image")]  # fmt: skip
    for files, said in cases:
        with pytest.raises(SystemExit):
            build(folder, files)
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(said, line), line
