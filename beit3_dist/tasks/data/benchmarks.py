"""The official files of public benchmarks as records of unilm/beit3's indexes.

A record is a line of an index, but for its text, which stays in words under `text` until a tokenizer is at hand.
Images need not be there: training checks them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beit3_dist.config import require
from beit3_dist.data.kinds import LeftOut, folders_in, images_in
from beit3_dist.data.text_files import read_large_json, read_records, require_text
from beit3_dist.tasks.data.names import check_names
from beit3_dist.tasks.data.vqa_answers import normalised, soft_scores

LEAST_ANSWERS = 9
"""Questions that must have an answer as their most frequent one for it to be learnt: 3,129 answers of VQA v2."""
VALIDATION_IMAGES = 1000
"""Images of VQA v2's validation set that are not trained on."""
KARPATHY_SPLITS = ("train", "restval", "val", "test")
NLVR2_SPLITS = {"train": ("train.json", "images/train"), "dev": ("dev.json", "dev"), "test-P": ("test1.json", "test1")}
"""Split of NLVR2 -> its file, and the folder of its images."""
VQA_SPLITS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
"""Split of VQA v2 -> what its files are called."""

Records = list[dict[str, Any]]
Indexes = dict[str, Records]


class NotOfficial(Exception):
    """What is not as in an official file."""


@contextmanager
def official(path: Path) -> Iterator[None]:
    """Turns what goes wrong inside, for lack of what the official file has, into a ValueError that names the file."""
    try:
        yield
    except NotOfficial as error:
        raise ValueError(f"{path} is not in the official format: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in the official format: {type(error).__name__}: {error}") from None


def load(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError if there is none, or no JSON."""
    require(path.is_file(), f"there is no file {path}")
    return read_large_json(path)


def text_in(record: dict[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise NotOfficial(f"{field} is {value!r:.100}, and no text")
    return value


def number_in(record: dict[str, Any], field: str) -> int:
    value = record[field]
    if type(value) is not int:
        raise NotOfficial(f"{field} is {value!r:.100}, and no whole number")
    return value


def once(ids: Iterable[Any], what: str) -> None:
    """Raises ValueError where one of the official numbers or names comes twice: one of the two would be lost, or both
    would be one prediction."""
    seen = set()
    for id in ids:
        require(id not in seen, f"{what} {id} comes twice")
        seen.add(id)


# ---------------------------------------------------------------------------------------- Karpathy: COCO and Flickr30k


def coco(path: Path) -> Indexes:
    """COCO's retrieval and captioning indexes from Karpathy's dataset_coco.json; `restval` belongs to train. Captioning
    has a line per caption in training, and a line per image, with its captions, in the other splits."""
    with official(path):
        images = [
            (image, "train" if image["split"] == "restval" else image["split"], f"{image['filepath']}/")
            for image in load(path)["images"]
        ]
        once((number_in(image, "cocoid") for image, _, _ in images), f"{path}: cocoid")
        indexes = _retrieval("coco_retrieval", images)
        for image, split, folder in images:
            lines = indexes.setdefault(f"coco_captioning.{split}.jsonl", [])
            record = {"image_path": folder + image["filename"], "image_id": image["cocoid"]}
            captions = [text_in(sentence, "raw") for sentence in image["sentences"]]
            if split == "train":
                lines.extend(record | {"text": caption} for caption in captions)
            else:
                lines.append(record | {"text": None, "captions": captions})
    return indexes


def flickr30k(path: Path) -> Indexes:
    """Flickr30k's retrieval indexes from Karpathy's dataset_flickr30k.json."""
    with official(path):
        return _retrieval("flickr30k", [(image, image["split"], "flickr30k-images/") for image in load(path)["images"]])


def _retrieval(name: str, images: list[tuple[dict[str, Any], str, str]]) -> Indexes:
    """A line per caption of each (image, split, folder); the images of a split are numbered in their order."""
    if not images:
        raise NotOfficial("it has no image")
    indexes: Indexes = {}
    numbers: Counter[str] = Counter()
    for image, split, folder in images:
        if split not in KARPATHY_SPLITS:  # it is part of a file's name
            raise NotOfficial(f"split is {split!r:.100}, and none of {', '.join(KARPATHY_SPLITS)}")
        record = {"image_path": folder + image["filename"], "image_id": numbers[split]}
        lines = indexes.setdefault(f"{name}.{split}.jsonl", [])
        lines.extend(record | {"text": text_in(sentence, "raw")} for sentence in image["sentences"])
        numbers[split] += 1
    return indexes


# -------------------------------------------------------------------------------------------------------------- VQA v2


def vqa(folder: Path, answers: list[str] | None) -> tuple[Indexes, list[str]]:
    """VQA v2's indexes and its answers, from the folder with the official questions and annotations.

    `answers`: the list to use; None: those that are the most frequent one of at least nine questions, in the order in
    which they occur. train and trainable_val, which are for training, leave out questions without a listed answer; val
    and rest_val keep them, and hold what the ten people answered. rest_val has 1,000 images, chosen by a hash of
    their numbers, and trainable_val the others of val.
    """
    annotations = {
        split: _by_question(folder / f"v2_mscoco_{VQA_SPLITS[split]}_annotations.json") for split in ("train", "val")
    }
    if answers is None:
        counts = Counter(
            normalised(answer["multiple_choice_answer"]) for side in annotations.values() for answer in side.values()
        )
        answers = [answer for answer, count in counts.items() if count >= LEAST_ANSWERS]
        require(bool(answers), f"{folder}: no answer is the most frequent one of {LEAST_ANSWERS} questions")
    numbers = {answer: number for number, answer in enumerate(answers)}
    indexes: Indexes = {}
    images: dict[str, int] = {}
    for split, name in VQA_SPLITS.items():
        path = folder / f"v2_OpenEnded_mscoco_{name}_questions.json"
        with official(path):
            lines = indexes[f"vqa.{split}.jsonl"] = []
            questions = load(path)["questions"]
            once((question["question_id"] for question in questions), f"{path}: question_id")
            for question in questions:
                stem = "test2015" if split.startswith("test") else name
                image = f"{stem}/COCO_{stem}_{number_in(question, 'image_id'):012d}.jpg"
                record = {"image_path": image, "text": text_in(question, "question"), "qid": question["question_id"]}
                if split not in annotations:
                    lines.append(record | {"labels": [], "scores": []})
                    continue
                given = [answer["answer"] for answer in annotations[split][question["question_id"]]["answers"]]
                scores = {numbers[answer]: s for answer, s in soft_scores(given).items() if answer in numbers}
                record |= {"labels": list(scores), "scores": list(scores.values())}
                if split == "val":
                    images[image] = question["image_id"]
                    lines.append(record | {"answers": given})
                elif scores:
                    lines.append(record)
    by_hash = sorted(images, key=lambda image: hashlib.sha256(str(images[image]).encode()).hexdigest())
    held = set(by_hash[:VALIDATION_IMAGES])
    validation = indexes["vqa.val.jsonl"]
    indexes["vqa.rest_val.jsonl"] = [record for record in validation if record["image_path"] in held]
    indexes["vqa.trainable_val.jsonl"] = [
        {name: value for name, value in record.items() if name != "answers"}
        for record in validation
        if record["image_path"] not in held and record["labels"]
    ]
    return indexes, answers


def _by_question(path: Path) -> dict[int, dict[str, Any]]:
    with official(path):
        annotations = load(path)["annotations"]
        once((annotation["question_id"] for annotation in annotations), f"{path}: question_id")
        return {annotation["question_id"]: annotation for annotation in annotations}


# --------------------------------------------------------------------------------------------------- NLVR2 and ImageNet


def nlvr2(folder: Path) -> Indexes:
    """NLVR2's indexes from the folder with train.json, dev.json and test1.json."""
    indexes: Indexes = {}
    for split, (name, images) in NLVR2_SPLITS.items():
        path = folder / name
        require(path.is_file(), f"there is no file {path}")
        lines = indexes[f"nlvr2.{split}.index.jsonl"] = []
        with official(path):
            for place, example in read_records(path):
                require_text(example, place)
                inside = f"{images}/{example['directory']}" if "directory" in example else images
                stem = f"{inside}/{example['identifier'].rpartition('-')[0]}"
                lines.append(
                    {
                        "image_path": f"{stem}-img0.png",
                        "image2_path": f"{stem}-img1.png",
                        "text": text_in(example, "sentence"),
                        "label": {"True": 1, "False": 0}[example["label"]],
                        "identifier": example["identifier"],
                    }
                )
            once((line["identifier"] for line in lines), f"{path}: identifier")
    return indexes


def imagenet(folder: Path, left_out: LeftOut) -> tuple[Indexes, list[str]]:
    """Indexes of FOLDER/train and FOLDER/val, which have a folder per class, and the names of these, sorted. What is no
    folder of a class and no image in one is counted. Raises ValueError where a side or a class of train lacks images,
    val has a class that train has not, or a class has a name that no list of classes can hold."""
    classes = _folders(folder / "train", left_out)
    check_names((f"{folder / 'train'}, class {label}", name) for label, name in enumerate(classes))
    unknown = sorted(set(_folders(folder / "val", left_out)) - set(classes))
    if unknown:
        raise ValueError(f"{folder / 'val'} has folders that train has not: {', '.join(unknown[:5])}")
    indexes = {
        f"imagenet.{side}.index.jsonl": [
            {"image_path": f"{side}/{name}/{image}", "label": label}
            for label, name in enumerate(classes)
            if (folder / side / name).is_dir()  # a class of train may be none of val
            for image in images_in(folder / side / name, left_out)
        ]
        for side in ("train", "val")
    }
    for name, lines in indexes.items():
        require(bool(lines), f"{folder}: no image for {name}; a side has a folder of images per class")
    seen = {line["label"] for line in indexes["imagenet.train.index.jsonl"]}
    for label, name in enumerate(classes):
        require(label in seen, f"{folder / 'train' / name} holds no image, but would be a class: take the folder out")
    return indexes, classes


def _folders(folder: Path, left_out: LeftOut) -> list[str]:
    """Names of the folders in a folder, sorted."""
    require(folder.is_dir(), f"there is no folder {folder}")
    return folders_in(folder, left_out)
