"""Small tasks from data sets that pip brings: records of indexes, as in `benchmarks`, and their images.

easy-VQA keeps its own split into train and test images: one coloured shape each, and questions. The demo's shards
hold its train side only, and the drawings and dictionary entries of the test sides are those that the shards hold
out: pretraining has seen nothing of a test side.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from beit3_dist.config import DataConfig
from beit3_dist.data.order import generator
from beit3_dist.data.sides import side
from beit3_dist.data.transforms import read_image
from beit3_dist.demo.sources import Emoji, definitions, demo_package, dictionary_entries
from beit3_dist.tasks.data.benchmarks import Indexes, Records
from beit3_dist.tasks.data.objects import box_of, runs_of

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
ANSWERS = sorted([*SHAPES, *COLORS, "yes", "no"])
"""Of easy-VQA."""
SHAPE_CLASSES = [f"{color} {kind}" for color in COLORS for kind in SHAPES]
SIDES = ("train", "test")
SENTENCES = {"train": 8000, "test": 1000}
PARTS_OF_SPEECH = {
    "n.": "noun",
    "a.": "adjective",
    "adj.": "adjective",
    "v. t.": "verb",
    "v. i.": "verb",
    "adv.": "adverb",
}
"""The dictionary's abbreviations, and the classes of the text task."""
TEXT_CLASSES = sorted(set(PARTS_OF_SPEECH.values()))
PER_PART = {"train": 2500, "test": 150}
"""Sentences of the text task per class at most, so that the classes are equally frequent."""
LEAST_WORDS = 3
SAME_COLOR = 16
"""Difference of levels up to which a pixel is the background's."""
SEED = 0
"""Of the sentences on two images."""


class Shape(NamedTuple):
    """What an image of easy-VQA shows."""

    color: str
    kind: str

    def __str__(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class EasySide:
    questions: list[tuple[int, str, str]]
    """Image, question and answer."""
    paths: dict[int, str]

    def shapes(self) -> dict[int, Shape]:
        """What the questions and answers say of images, where colour and kind follow from them; by image. 'What color
        is the circle?' - 'red' tells both. 'Is there a blue shape?' - 'no' and 'is no circle present?' - 'yes' rule one
        out each."""
        possible = {image: (set(COLORS), set(SHAPES)) for image in sorted(self.paths)}
        for image, question, answer in self.questions:
            words = set(re.findall(r"\w+", question))
            if answer not in ("yes", "no"):
                told, is_so = words | {answer}, True
            else:
                told, is_so = words, (answer == "yes") != bool(words & {"no", "not"})
            for left, values in zip(possible[image], (COLORS, SHAPES), strict=True):
                if is_so and told.intersection(values):
                    left &= told
                elif not is_so:
                    left -= told
        return {
            image: Shape(*colors, *kinds)
            for image, (colors, kinds) in possible.items()
            if len(colors) == len(kinds) == 1
        }

    def image_path(self, number: int, split: str) -> str:
        """Where the image lies in the demo's folder."""
        return f"images/easy_vqa/{split}/{number}.png"


def easy_vqa() -> dict[str, EasySide]:
    package = demo_package("easy_vqa")
    found = {}
    for split in SIDES:
        questions, given, images = getattr(package, f"get_{split}_questions")()
        paths = getattr(package, f"get_{split}_image_paths")()
        found[split] = EasySide(list(zip(images, questions, given, strict=True)), paths)
    return found


def vqa(easy: dict[str, EasySide]) -> Indexes:
    numbers = {answer: number for number, answer in enumerate(ANSWERS)}

    def records(source: EasySide, split: str) -> Iterator[dict[str, Any]]:
        for number, (image, question, answer) in enumerate(source.questions):
            answered = {"labels": [numbers[answer]], "scores": [1.0], "answers": [answer]}
            yield {"image_path": source.image_path(image, split), "text": question, **answered, "qid": number}

    return {f"vqa.{split}.jsonl": list(records(source, split)) for split, source in easy.items()}


def questions(asked: Indexes) -> Indexes:
    """The questions of `vqa` without their images, as sentences whose class is the answer: what a model gets right
    here, it does not see."""
    return {
        name.replace("vqa", "questions"): [{"text": line["text"], "label": line["labels"][0]} for line in lines]
        for name, lines in asked.items()
    }


def _of_shapes(name: str, easy: dict[str, EasySide], fields: Callable[[int, Shape], dict[str, Any]]) -> Indexes:
    """A record for each image whose shape is known: its path and these fields, of its number and its shape."""

    def records(source: EasySide, split: str) -> Iterator[dict[str, Any]]:
        for image, shape in source.shapes().items():
            yield {"image_path": source.image_path(image, split), **fields(image, shape)}

    return {f"{name}.{split}.jsonl": list(records(source, split)) for split, source in easy.items()}


def shapes(easy: dict[str, EasySide]) -> Indexes:
    numbers = {name: number for number, name in enumerate(SHAPE_CLASSES)}
    return _of_shapes("shapes", easy, lambda _, shape: {"label": numbers[str(shape)]})


BACKGROUND = "background"
SEGMENTS = [BACKGROUND, *COLORS]
"""Classes of the pixels of easy-VQA's images: colours, which the demo's pretraining tells apart, as it hardly does
shapes."""


def shape_pixels(image: np.ndarray) -> np.ndarray:
    """Which pixels of an image uint8 [H, W, 3] of easy-VQA are its shape's, bool [H, W]: the images show one shape of a
    colour before another one, and what mixes both at its border belongs to the nearer."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = _most_frequent(border)
    inside = image.reshape(-1, 3)[(np.abs(image.reshape(-1, 3).astype(int) - ground) > SAME_COLOR).any(1)]
    shape = _most_frequent(inside)
    distances = [np.square(image.astype(int) - color).sum(-1) for color in (shape, ground)]
    return distances[0] < distances[1]


@cache
def _shape_in(path: str) -> np.ndarray:
    return shape_pixels(np.asarray(read_image(path, DataConfig.max_pixels)))


def _most_frequent(pixels: np.ndarray) -> np.ndarray:
    colors, counts = np.unique(pixels, axis=0, return_counts=True)
    return colors[counts.argmax()].astype(int)


def segmentation(easy: dict[str, EasySide]) -> tuple[Indexes, dict[str, bytes]]:
    """A class for each pixel of the images whose shape is known, and their masks by name."""
    files = {}

    def fields(image: int, shape: Shape) -> dict[str, Any]:
        return {"nothing": 255, "first": 0}

    indexes = _of_shapes("segmentation", easy, fields)
    for split, source in easy.items():
        for record, (number, shape) in zip(
            indexes[f"segmentation.{split}.jsonl"], source.shapes().items(), strict=True
        ):
            record["mask_path"] = record["image_path"].replace("images/", "masks/", 1)
            pixels = _shape_in(source.paths[number])
            files[record["mask_path"]] = _png(pixels * np.uint8(SEGMENTS.index(shape.color)))
    return indexes, files


def objects(easy: dict[str, EasySide]) -> Indexes:
    """A box and a mask for the shape of each image whose shape is known; its class is its colour."""

    def fields(split: str) -> Callable[[int, Shape], dict[str, Any]]:
        def marked(image: int, shape: Shape) -> dict[str, Any]:
            pixels = _shape_in(easy[split].paths[image])
            x0, y0, x1, y1 = box_of(pixels).tolist()
            one = {"id": image, "label": COLORS.index(shape.color), "box": [x0, y0, x1 - x0, y1 - y0]}
            one |= {"area": int(pixels.sum()), "mask": runs_of(pixels)}
            return {"image_id": image, "width": pixels.shape[1], "height": pixels.shape[0], "objects": [one]}

        return marked

    found: Indexes = {}
    for split, source in easy.items():
        found |= _of_shapes("objects", {split: source}, fields(split))
    return found


def _png(numbers: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, "PNG")
    return file.getvalue()


def caption(shape: Shape) -> str:
    """What an image of the shape is called, in the demo's pairs and in the task `captioning`."""
    return f"a {shape}"


def captioning(easy: dict[str, EasySide]) -> Indexes:

    def fields(image: int, shape: Shape) -> dict[str, Any]:
        return {"text": caption(shape), "captions": [caption(shape)], "image_id": image}

    return _of_shapes("captioning", easy, fields)


# ------------------------------------------------------------------------------------------ sentences on two images


def _another(value: str, values: tuple[str, ...], rng: np.random.Generator) -> str:
    return str(rng.choice([other for other in values if other != value]))


def _changed(shape: Shape, rng: np.random.Generator) -> Shape:
    """The shape in another colour, or another one in its colour."""
    if rng.random() < 0.5:
        return shape._replace(color=_another(shape.color, COLORS, rng))
    return shape._replace(kind=_another(shape.kind, SHAPES, rng))


def _both(values: tuple[str, ...], say: str, pair: list[Shape], truth: bool, rng: np.random.Generator) -> str | None:
    first, second = (next(value for value in shape if value in values) for shape in pair)
    return f"{say} {first if truth else _another(first, values, rng)}" if first == second else None


def _one_side(pair: list[Shape], truth: bool, rng: np.random.Generator) -> str | None:
    place = int(rng.integers(2))
    shown, other = pair[place], pair[1 - place]
    if shown == other:
        return None
    told = shown if truth else other if rng.random() < 0.5 else _changed(shown, rng)
    return f"the {('left', 'right')[place]} picture shows a {told}"


def _color_of_side(pair: list[Shape], truth: bool, rng: np.random.Generator) -> str | None:
    place = int(rng.integers(2))
    color = pair[place].color
    return f"the {('left', 'right')[place]} shape is {color if truth else _another(color, COLORS, rng)}"


SAYINGS = (
    partial(_both, SHAPES, "both pictures contain a"),
    partial(_both, COLORS, "both shapes are"),
    _one_side,
    _color_of_side,
)
"""Each says something true or false of two shapes; None: these two are not for it. Which two suit does not depend on
the truth, so that neither the images nor the sentence alone gives it away."""


def nlvr2(easy: dict[str, EasySide]) -> Indexes:
    """Two images of one side and a sentence; each kind of sentence is true and false equally often."""
    return {f"nlvr2.{split}.jsonl": list(_sentences(source, split)) for split, source in easy.items()}


def _sentences(source: EasySide, split: str) -> Iterator[dict[str, Any]]:
    known = source.shapes()
    images = list(known)
    for number in range(SENTENCES[split]):
        say, truth = SAYINGS[number // 2 % len(SAYINGS)], bool(number % 2)
        rng = generator(SEED, SIDES.index(split), number)
        sentence = None
        while sentence is None:  # Of all pairs, an eighth are of one colour.
            first, step = int(rng.integers(len(images))), int(rng.integers(1, len(images)))
            two = [images[first], images[(first + step) % len(images)]]
            sentence = say([known[image] for image in two], truth, rng)
        paths = {"image_path": source.image_path(two[0], split), "image2_path": source.image_path(two[1], split)}
        yield paths | {"text": sentence, "label": int(truth), "identifier": f"{split}-{number}"}


# ------------------------------------------------------------------------------------------------ drawings, dictionary


def retrieval(emoji: list[Emoji], held_out: float) -> tuple[Indexes, dict[str, bytes]]:
    indexes: Indexes = {f"retrieval.{split}.jsonl": [] for split in SIDES}
    files: dict[str, bytes] = {}
    for number, one in enumerate(emoji):
        path = f"images/openmoji/{number:04d}.png"
        files[path] = one.png
        lines = indexes[f"retrieval.{_split(one.identity, held_out)}.jsonl"]
        lines.append({"image_path": path, "text": one.name, "image_id": len(lines)})
    return indexes, files


def text(held_out: float) -> Indexes:
    """Definitions without their headword, and its part of speech; the first of each class in a keyed order."""
    found: dict[tuple[str, str], Records] = defaultdict(list)
    for headword, parts in dictionary_entries():
        document = f"{headword}: {definitions(parts)}"
        for part in parts:
            kind, meaning = PARTS_OF_SPEECH.get(part.get("part_of_speech") or ""), definitions([part])
            if kind and len(meaning.split()) >= LEAST_WORDS:
                record = {"text": meaning, "label": TEXT_CLASSES.index(kind)}
                found[_split(document.encode(), held_out), kind].append(record)
    indexes: Indexes = {}
    for split in SIDES:
        chosen: Records = []
        for kind in TEXT_CLASSES:
            order = generator(SEED, TEXT_CLASSES.index(kind)).permutation(len(found[split, kind]))
            chosen += [found[split, kind][place] for place in order[: PER_PART[split]]]
        indexes[f"text.{split}.jsonl"] = chosen
    return indexes


def _split(identity: bytes, held_out: float) -> str:
    """test for what the demo's shards hold out, else train."""
    return "test" if side(identity, held_out) == "held_out" else "train"
