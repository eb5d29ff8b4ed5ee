#!/usr/bin/env python3
"""Draws what a fine-tuned model says of the places of images: OUT/NAME.png.

    python tools/draw.py MODEL IMAGE ... --out FOLDER

MODEL is a model folder, or that of a fine-tuning run. Of task segmentation each pixel is painted in the colour of its
class, and OUT/classes.png names the colours of those that were found; of detection and instance_segmentation objects
are drawn with their names and scores.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from beit3_dist.command_line import refusing
from beit3_dist.config import require
from beit3_dist.inference import Model, open_image
from beit3_dist.tasks.parts.drawing import colour_of, painted, with_objects

PROGRAM = "draw.py"
ROW, WIDE = 16, 320
"""Height and width of a line of the list of colours, in pixels."""


def draw(model: Model, paths: list[Path], out: Path) -> None:
    """A picture for each image, and of classes of pixels the list of their colours. Raises ValueError for a model of
    another task."""
    out.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    for path in paths:
        image = open_image(path)
        if "detect" in model.task.serves:
            picture = with_objects(image, model.detect([image])[0], model.task.classes)
        else:
            classes = torch.from_numpy(model.segment([image])[0])
            pixels = painted(torch.from_numpy(np.array(image)).permute(2, 0, 1), classes)
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            seen.update(classes.unique().tolist())
        picture.save(out / f"{path.stem}.png")
    if seen:
        listed = Image.new("RGB", (WIDE, ROW * len(seen)), "white")
        pen = ImageDraw.Draw(listed)
        for place, number in enumerate(sorted(seen)):
            pen.rectangle((0, place * ROW, ROW - 1, (place + 1) * ROW - 1), colour_of(number))
            pen.text((ROW + 4, place * ROW + 2), model.task.classes[number], "black")
        listed.save(out / "classes.png")


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="model folder, or a fine-tuning run's")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image to draw over")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the pictures")
    parser.add_argument("--device", metavar="NAME", help="such as cuda:1 or cpu; the first GPU where there is one")
    options = parser.parse_args(arguments)
    with refusing(PROGRAM):
        names = Counter(path.stem for path in options.images)
        twice = [name for name, times in names.items() if times > 1 or name == "classes"]
        require(not twice, f"{', '.join(twice)}: two pictures of one name; draw them to two folders")
        draw(Model.load(options.model, options.device), options.images, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
