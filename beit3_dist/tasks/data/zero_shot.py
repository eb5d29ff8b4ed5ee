"""What a model is scored on as it is: images with all their captions, and images with classes, whose names are put into
prompt templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from beit3_dist.config import CaptionKey, DataConfig, EvalConfig, require
from beit3_dist.data.captions import fields_of, json_first, read_captions
from beit3_dist.data.faults import BadSample
from beit3_dist.data.index import open_table
from beit3_dist.data.order import Stream
from beit3_dist.data.reader import ShardReader
from beit3_dist.data.text_files import read_lines
from beit3_dist.looking import of_node
from beit3_dist.opening import blaming
from beit3_dist.tasks.data.batches import decoded
from beit3_dist.tasks.data.class_shards import read_class_shards
from beit3_dist.tasks.data.examples import Example, TarMember
from beit3_dist.tasks.data.names import read_names

SHIPPED = "shipped"
TEMPLATES = (
    "{}",
    "a photo of a {}",
    "a picture that shows the {}",
    "one {} seen from near",
    "a {} far away in the background",
    "a drawing of some {}",
    "a dark, blurred image of a {}",
    "this is a {}, and nothing else",
)
"""Those that come with the program: the name alone, kinds of pictures, sizes, bad pictures."""


@dataclass
class Captioned:
    """Images with what people say of them."""

    images: list[Any] = field(default_factory=list)
    """Where each image lies: a path, or a member of a tar."""
    captions: list[list[str]] = field(default_factory=list)
    """Of each image."""


Labelled = tuple[list[Any], Tensor]
"""Where each of N images lies, and its class, int64 [N]."""


@dataclass
class Classed:
    """Images with their classes."""

    images: list[Any]
    labels: Tensor
    """int64 [N]."""
    names: list[str]
    """Of the classes."""
    templates: tuple[str, ...]
    train: Labelled | None = None
    """What the classes are learnt from, with the encoder frozen."""


@dataclass(frozen=True)
class ZeroShotData:
    """What a run is scored on beside its held-out losses."""

    retrieval: Captioned | None
    captions: Captioned | None
    classed: Classed | None


def spread(count: int, at_most: int) -> Sequence[int]:
    """Which of `count` samples are scored: all, or `at_most` at equal distances, since images of a class often lie
    together. 0: there is no limit."""
    return range(count) if not 0 < at_most < count else [place * count // at_most for place in range(at_most)]


def captioned_tars(pattern: str, name: str, cache: str, caption_key: CaptionKey, at_most: int = 0) -> Captioned:
    """The pairs of tars, or `at_most` of them; every line of a .txt member is a caption of its image. Raises ValueError
    naming the field `name`, or the tar and the pair."""
    table = open_table(pattern, name, Stream.PAIRS, cache, json_first=json_first(caption_key))
    reader, found, fields = ShardReader(table), Captioned(), fields_of(caption_key)
    for number in spread(len(table.rows), at_most):
        row = table.rows[number]
        try:
            found.captions.append(read_captions(row, reader, fields).texts)
        except BadSample as bad:
            raise ValueError(f"{table.shard(number)}, {table.key(number)}: {bad}") from None
        found.images.append(TarMember(table.files[int(row["shard"])], *map(int, row["image"])))
    return found


def classed_tars(pattern: str, name: str, cache: str, classes: int, at_most: int = 0) -> Labelled:
    """The images of tars, or `at_most` of them, with the classes of their .cls members. Raises ValueError as
    `read_class_shards` does."""
    return labelled(read_class_shards(pattern, name, cache, classes), at_most)


def labelled(examples: Sequence[Example], at_most: int = 0) -> Labelled:
    """Of each example, or of `at_most` of them, its image and its class."""
    listed = [examples[place] for place in spread(len(examples), at_most)]
    return [example.images[0] for example in listed], torch.tensor([example.label for example in listed])


def read_templates(file: str, name: str) -> tuple[str, ...]:
    """The lines of a file, each with {} in the place of a class's name; `shipped`: TEMPLATES. Raises ValueError naming
    the field `name`."""
    if file == SHIPPED:
        return TEMPLATES
    with blaming(name, OSError):
        templates = tuple(line for _, line in read_lines(Path(file)) if line.strip())
        if not templates or any("{}" not in template for template in templates):
            raise ValueError(f"{file} needs lines that have {{}} in the place of the name")
    return templates


def decoded_whole(image: Any, name: str) -> Image.Image:
    """An image that is scored. Raises ValueError naming it where it cannot be: a score is of all images or of none."""
    try:
        return decoded(image, DataConfig.max_pixels)
    except BadSample as bad:
        raise ValueError(f"{name}: {image}: {bad}") from None


def open_zero_shot(config: EvalConfig, data: DataConfig) -> ZeroShotData | None:
    """What `eval.retrieval`, `eval.captions` and `eval.classes` name, which one process of a node opens; None for
    nothing. Raises ValueError naming the field."""
    if not config.every or not config.scored:
        return None
    seen = of_node(lambda: _plain(_opened(config, data)))
    pairs = {
        field: Captioned(_members(images), captions)
        for field, (images, captions) in ((field, seen[field]) for field in ("retrieval", "captions") if seen[field])
    }
    classed = None
    if seen["classed"]:
        labelled = [(_members(images), torch.tensor(labels)) for images, labels in seen["classed"]]
        classed = Classed(*labelled[0], seen["names"], tuple(seen["templates"]), *labelled[1:])
    return ZeroShotData(pairs.get("retrieval"), pairs.get("captions"), classed)


def _members(images: Sequence[Sequence[Any]]) -> list[Any]:
    return [TarMember(*place) for place in images]


def _plain(data: ZeroShotData) -> dict[str, Any]:
    """What the process that looks tells the others: of members of tars where they lie."""

    def places(images: list[Any]) -> list[Any]:
        return [(image.tar, image.offset, image.size) for image in images]

    told: dict[str, Any] = {
        field: None if pairs is None else (places(pairs.images), pairs.captions)
        for field, pairs in (("retrieval", data.retrieval), ("captions", data.captions))
    }
    classed, sides = data.classed, list[Labelled]()
    if classed is not None:
        sides = [(classed.images, classed.labels), *([] if classed.train is None else [classed.train])]
        told |= {"names": classed.names, "templates": classed.templates}
    return told | {"classed": [(places(images), labels.tolist()) for images, labels in sides]}


def _opened(config: EvalConfig, data: DataConfig) -> ZeroShotData:
    limit = config.at_most
    pairs = {
        field: captioned_tars(pattern, f"eval.{field}", data.cache, data.caption_key, limit)
        for field in ("retrieval", "captions")
        if (pattern := getattr(config, field))
    }
    classed = None
    if config.classes:
        require(bool(config.class_names), "eval.classes needs eval.class_names, a file with a class's name a line")
        with blaming("eval.class_names", OSError):
            names = read_names(Path(config.class_names))
        sides = {
            field: classed_tars(pattern, f"eval.{field}", data.cache, len(names), limit)
            for field in ("classes", "classes_train")
            if (pattern := getattr(config, field))
        }
        templates = read_templates(config.templates, "eval.templates")
        classed = Classed(*sides["classes"], names, templates, sides.get("classes_train"))
    return ZeroShotData(pairs.get("retrieval"), pairs.get("captions"), classed)
