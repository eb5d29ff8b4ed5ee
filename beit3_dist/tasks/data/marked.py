"""COCO's JSON of boxes and masks, and those of LVIS and Objects365, which are like it, as records of indexes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from beit3_dist.config import require
from beit3_dist.data.kinds import LeftOut, leave_out
from beit3_dist.data.text_files import read_records
from beit3_dist.opening import inside
from beit3_dist.tasks.data.benchmarks import Indexes, NotOfficial, load, number_in, official, once, text_in
from beit3_dist.tasks.data.examples import Malformed, first_of, missing_files
from beit3_dist.tasks.data.names import check_names
from beit3_dist.tasks.data.objects import check_mask, cut_box, mask_tools, run_length

Category = dict[str, Any]
"""A line of classes.jsonl: `answer` (its name), `label`, and `id`, the benchmark's number for it."""


def marked_images(
    files: Sequence[Path], images: Path, left_out: LeftOut | None = None
) -> tuple[Indexes, list[Category]]:
    """An index for each file, and the categories, which all of them share.

    `images`: folder of the images, or of COCO's train2017 and val2017, or of Objects365's patches. `left_out`: counts
    objects and images that are faulty and left out; None: they are an error. Raises ValueError that counts all faults
    and names the first by file and annotation or image, or says what else is not as in these data sets.
    """
    indexes: Indexes = {}
    shared: tuple[Path, list[Category]] | None = None
    faults: list[tuple[str, str]] = []
    once((path.stem for path in files), "the name of a file")
    for path in files:
        with official(path):
            content = load(path)
            categories = _categories(path, content["categories"])
            if shared is not None and shared[1] != categories:
                raise ValueError(f"{path} has other categories than {shared[0]}")
            shared = path, categories
            indexes[f"{path.stem}.jsonl"] = list(_records(path, content, categories, images, faults))
    if faults and left_out is None:
        listed = [f"{place}: {reason}" for place, reason in faults]
        raise ValueError(f"{len(faults)} faults: {first_of(listed)}. --leave-out-faulty leaves them out")
    for place, reason in faults:
        assert left_out is not None
        leave_out(left_out, reason.partition(" [")[0], place)  # the kind without its numbers
    assert shared is not None
    return indexes, shared[1]


def category_ids(classes: Path) -> list[int]:
    """The benchmark's number of each class, from the file that names them; where it has none, from 1 on."""
    given = [record for _, record in read_records(classes)] if classes.suffix == ".jsonl" else []
    by_label = {record["label"]: record.get("id") for record in given}
    ids = [by_label[label] for label in range(len(by_label))]
    require(all(type(id) is int for id in ids), f"{classes}: a class has no whole number as its id")
    return ids


def _categories(path: Path, given: list[dict[str, Any]]) -> list[Category]:
    once((number_in(category, "id") for category in given), f"{path}: category")
    ordered = sorted(given, key=lambda category: category["id"])
    check_names((f"{path}, category {category['id']}", text_in(category, "name")) for category in ordered)
    return [{"answer": c["name"], "label": label, "id": c["id"]} for label, c in enumerate(ordered)]


def _records(
    path: Path, content: dict[str, Any], categories: list[Category], root: Path, faults: list[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """The images whose files are there, with their sound objects; of a file for training, those that have any."""
    labels = {category["id"]: category["label"] for category in categories}
    images = content["images"]
    once((number_in(image, "id") for image in images), f"{path}: image")
    if not images:
        raise NotOfficial("it has no image")
    by_image: dict[int, list[dict[str, Any]]] | None = None
    if "annotations" in content:
        by_image = defaultdict(list)
        known = {image["id"] for image in images}
        for annotation in content["annotations"]:
            place = f"{path}, annotation {annotation['id']}"
            if annotation["image_id"] not in known:
                faults.append((place, f"there is no image {annotation['image_id']}"))
            elif annotation["category_id"] not in labels:
                faults.append((place, f"there is no category {annotation['category_id']}"))
            else:
                by_image[annotation["image_id"]].append(annotation)
    reading = _reading(path, images[0], root)
    missing = _missing([inside(root, _ways(path, image)[reading]) for image in images])
    for image in images:
        name = _ways(path, image)[reading]
        place = f"{path}, image {image['id']}"
        if reason := missing.get(os.fspath(inside(root, name))):
            faults.append((place, f"{reason} {root / name}"))
            continue
        width, height = number_in(image, "width"), number_in(image, "height")
        record = {"image_path": name, "image_id": image["id"], "width": width, "height": height}
        if by_image is None:
            yield record
            continue
        record["objects"] = []
        for annotation in by_image[image["id"]]:
            try:
                record["objects"].append(_object(annotation, labels, width, height))
            except Malformed as reason:
                faults.append((f"{path}, annotation {annotation['id']}", str(reason)))
        for field, ours in (("neg_category_ids", "absent"), ("not_exhaustive_category_ids", "unfinished")):
            if field in image:
                record[ours] = [labels[category] for category in image[field]]
        if record["objects"] or "train" not in path.stem:
            yield record


def _object(annotation: dict[str, Any], labels: dict[int, int], width: int, height: int) -> dict[str, Any]:
    """Raises Malformed."""
    box = cut_box(annotation["bbox"], width, height)
    found = {"id": annotation["id"], "box": box, "label": labels[annotation["category_id"]]}
    found["area"] = annotation.get("area", box[2] * box[3])
    if annotation.get("iscrowd"):
        found["crowd"] = True
    if annotation.get("segmentation"):
        mask = annotation["segmentation"]
        check_mask(mask, height, width)
        if not mask_tools().area(run_length(mask, height, width)):
            raise Malformed("its mask is empty")
        found["mask"] = mask
    elif "segmentation" in annotation and not annotation.get("iscrowd"):
        raise Malformed("its mask is empty")
    return found


def _ways(path: Path, image: dict[str, Any]) -> list[str]:
    """Where an image may lie below the folder of images: by its name, in the folder of its side, in that of its
    address (LVIS), or in its patch (Objects365)."""
    name = PurePosixPath(image.get("file_name") or image["coco_url"])
    address = PurePosixPath(image.get("coco_url") or name)
    side = path.stem.rpartition("_")[2]
    return [str(name), f"{side}/{name}", "/".join(address.parts[-2:]), "/".join(name.parts[-2:])]


def _reading(path: Path, image: dict[str, Any], root: Path) -> int:
    """Which of the ways leads to the first image."""
    ways = _ways(path, image)
    for number, name in enumerate(ways):
        try:
            if inside(root, name).is_file():
                return number
        except ValueError:  # it leads out of the folder
            continue
    tried = ", ".join(dict.fromkeys(ways))
    raise ValueError(f"{path}, image {image['id']}: there is no file in {root} of the names {tried}: see --images")


def _missing(paths: Sequence[Path]) -> dict[str, str]:
    """Path -> what is wrong with it."""
    needed: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, name = os.path.split(path)
        needed[folder].add(name)
    return missing_files(needed)
