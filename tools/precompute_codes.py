#!/usr/bin/env python3
r"""Computes the visual codes of a pretraining run's images once, so that the run looks them up at every step.

    python tools/precompute_codes.py --out CODES --config RECIPE.yaml [--a.b VALUE ...]              training crops
    python tools/precompute_codes.py --out CODES --held_out --config RECIPE.yaml [--a.b VALUE ...]   held-out images

The recipe and its overrides are those of the run, but for --out. The run then takes --image_codes CODES (training)
or --eval.image_codes CODES (held-out). Its crops are a function of its seed, so their codes are those that the
tokenizer would give (but for patches that lie between two codes to within rounding, which may fall either way when
they are computed in another batch), without the tokenizer's share of the step. Codes of training crops serve for as
many steps as the recipe has, in whatever layout, and take 2 bytes a patch: 1.6 GB for each thousand steps of the base
recipe (2,048 images and pairs each, 196 patches). So they pay where several runs see the same crops, or where the
tokenizer is large beside the model; the held-out ones always pay.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import islice
from pathlib import Path

from beit3_dist.command_line import log_to_console, parse, refusing
from beit3_dist.config import RunConfig, require
from beit3_dist.objectives import SECTIONS

PROGRAM = "precompute_codes.py"


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="CODES", type=Path, help="new folder of codes")
    parser.add_argument("--held_out", action="store_true", help="the images of eval.*, not the training crops")
    options, recipe = parser.parse_known_args(arguments)
    config = parse(RunConfig, PROGRAM, "Computes visual codes.", [*recipe, f"--out={options.out}"], SECTIONS)
    log_to_console()
    with refusing(PROGRAM):
        precompute(config, options.out, options.held_out)


def precompute(config: RunConfig, folder: Path, held_out: bool) -> None:
    """Writes the folder. Raises ValueError with one line where something does not fit."""
    # torch takes seconds to import: a typo is reported before that.
    import torch

    from beit3_dist.data.batch import MixedBatches, requests_from
    from beit3_dist.data.loader import loader
    from beit3_dist.data.views import SeenImages
    from beit3_dist.devices import device_type
    from beit3_dist.image_tokenizer.codes import image_ids, made_from, positions_taken, write_codes
    from beit3_dist.image_tokenizer.files import load_vqkd
    from beit3_dist.image_tokenizer.targets import ImageTargets, tokenizer_view_size

    require(not held_out or config.eval.every > 0, "eval.every=0: this recipe validates on nothing; set it and eval.*")
    device = torch.device(device_type())
    tokenizer = load_vqkd(config.image_tokenizer)
    view = tokenizer_view_size(tokenizer, config.image_tokenizer, config.model)
    batches = MixedBatches(config, view, rank=0, world=1, held_out=held_out)
    made = made_from(config, view, held_out, batches)
    steps = config.eval.batches if held_out else config.steps
    requests = list(islice(requests_from((0, 0, 0), config.batch), steps * config.batch.accumulation))
    started = time.perf_counter()
    read = loader(batches, requests, config.data.workers, config.data.prefetch, pin=device.type == "cuda")
    tokenize = ImageTargets(tokenizer, device)
    coded = ((image_ids(batch), tokenize(SeenImages(batch, device).tokenizer)) for batch in read)
    written = write_codes(folder, coded, made, positions_taken(config, held_out))
    seconds = time.perf_counter() - started
    print(f"wrote the codes of {written:,} images to {folder} in {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
