#!/usr/bin/env python3
"""Shows what the codes of an image tokenizer stand for: RUN/codes.png.

    python tools/show_codes.py RUN [--out PNG] [--pictures N]

RUN is the folder of the training of an image tokenizer. Below each image are its codes: every patch replaced by the
patch, of 2,048 other images, whose vector is nearest to the code's. What a pretraining run makes of masked images is
drawn by tools/report.py.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from beit3_dist.command_line import parse, refusing
from beit3_dist.config import require
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.image_tokenizer.drawing import mosaic, nearest_patches, sheet
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.image_tokenizer.images import ImageBatches

PROGRAM = "show_codes.py"
OTHERS = 2048
AT_ONCE = 32
LEGIBLE = 128


def rows_of(folder: Path, number: int) -> list[Tensor]:
    """Images of the run's training shards, and their codes."""
    weights = folder / "image_tokenizer.pth"
    require(weights.is_file(), f"{folder} has trained no image tokenizer: there is no {weights.name}")
    config = parse(TokenizerConfig, PROGRAM, "", ["--config", str(folder / "config.yaml")])
    tokenizer = load_vqkd(weights)
    batches = ImageBatches(config.data, config.model.image_size, config.seed, AT_ONCE, 0, 1)
    shown = torch.cat([batches[step][0] for step in range(-(-number // AT_ONCE))])[:number]
    others = (batches[step][0] for step in range(number, number + OTHERS // AT_ONCE))
    codes = tokenizer.encode(shown.float() / 255)
    return [shown, mosaic(codes, nearest_patches(tokenizer, others))]


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of train_image_tokenizer")
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture to write; RUN/codes.png")
    parser.add_argument("--pictures", type=int, default=12, metavar="N", help="images to show; 12")
    options = parser.parse_args(arguments)
    with refusing(PROGRAM):
        require(options.pictures >= 1, f"--pictures {options.pictures} is not positive")
        rows = rows_of(options.run, options.pictures)
        picture, out = Image.fromarray(sheet(rows).permute(1, 2, 0).numpy()), options.out or options.run / "codes.png"
        zoom = max(1, LEGIBLE // rows[0].shape[-1])
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(out)
    print(out)


if __name__ == "__main__":
    main()
