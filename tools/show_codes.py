#!/usr/bin/env python3
"""Shows what visual codes stand for: RUN/codes.png.

    python tools/show_codes.py RUN [--out PNG] [--pictures N]

RUN is the folder of a pretraining run, or of the training of an image tokenizer. A column is an image; the rows are

    1  the image
    2  its codes: every patch replaced by the patch, of 2,048 other images, whose vector is nearest to the code's
    3  the masked input, hidden patches in grey       (pretraining runs)
    4  hidden patches drawn like row 2, from the codes that the model predicts

A pretraining run shows held-out images where it has any, first of the image stream, then of pairs.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from report import examples, open_run
from torch import Tensor

from beit3_dist.command_line import parse, refusing
from beit3_dist.config import require
from beit3_dist.data.batch import requests_from
from beit3_dist.data.views import SeenImages
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.image_tokenizer.drawing import mosaic, nearest_patches, sheet
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.image_tokenizer.images import ImageBatches

PROGRAM = "show_codes.py"
OTHERS = 2048
AT_ONCE = 32
GREY = 150
LEGIBLE = 128


def tokenizer_rows(folder: Path, number: int) -> list[Tensor]:
    """Images of the run's training shards, and their codes."""
    config = parse(TokenizerConfig, PROGRAM, "", ["--config", str(folder / "config.yaml")])
    tokenizer = load_vqkd(folder / "image_tokenizer.pth")
    batches = ImageBatches(config.data, config.model.image_size, config.seed, AT_ONCE, 0, 1)
    shown = torch.cat([batches[step][0] for step in range(-(-number // AT_ONCE))])[:number]
    others = (batches[step][0] for step in range(number, number + OTHERS // AT_ONCE))
    codes = tokenizer.encode(shown.float() / 255)
    return [shown, mosaic(codes, nearest_patches(tokenizer, others))]


def pretraining_rows(folder: Path, number: int) -> list[Tensor]:
    """Images of the run, their codes, the masked input and the model's prediction."""
    run = open_run(folder, PROGRAM)
    shown = [example for some in examples(run, torch.device("cpu"), -(-number // 2)).values() for example in some]
    if run.image_tokenizer is None or not shown:
        raise ValueError(f"{folder} masks no images, so that there are no codes to show")
    images = torch.stack([example.image for example in shown])
    hidden = torch.stack([example.hidden for example in shown])
    requests = islice(requests_from((0, 0, 0), run.train.config.batch), OTHERS // (2 * AT_ONCE))
    others = (SeenImages(run.train[request], torch.device("cpu")).tokenizer for request in requests)
    looks = nearest_patches(run.image_tokenizer, others)
    true, guessed = (
        resized(mosaic(torch.stack(codes), looks), images.shape[-1])
        for codes in ([example.codes for example in shown], [example.guesses for example in shown])
    )
    mask = enlarged(hidden, images.shape[-1])
    return [images, true, images.masked_fill(mask, GREY), torch.where(mask, guessed, images)]


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, S, S] -> [B, 3, size, size]: the tokenizer's view may have another size than the model's."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True).round().byte()


def enlarged(hidden: Tensor, size: int) -> Tensor:
    """bool [B, patches] -> [B, 1, size, size]."""
    grid = int(hidden.shape[1] ** 0.5)
    return hidden.view(-1, 1, grid, grid).repeat_interleave(size // grid, 2).repeat_interleave(size // grid, 3)


def parse_arguments(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of pretrain or train_image_tokenizer")
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture to write; RUN/codes.png")
    parser.add_argument("--pictures", type=int, default=12, metavar="N", help="images to show; 12")
    options = parser.parse_args(arguments)
    options.out = options.out or options.run / "codes.png"
    require(options.pictures >= 1, f"--pictures {options.pictures} is not positive")
    require(options.run.is_dir(), f"{options.run} is no folder")
    return options


def main(arguments: list[str] | None = None) -> None:
    with refusing(PROGRAM):
        options = parse_arguments(arguments)
        is_tokenizer = (options.run / "image_tokenizer.pth").is_file()
        rows = (tokenizer_rows if is_tokenizer else pretraining_rows)(options.run, options.pictures)
        picture = Image.fromarray(sheet(rows).permute(1, 2, 0).numpy())
        zoom = max(1, LEGIBLE // rows[0].shape[-1])
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
