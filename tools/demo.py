#!/usr/bin/env python3
"""Serves a page to try models on this machine: ask, caption, search, classify, fill in words, look inside.

    python tools/demo.py MODEL [MODEL ...] [--pictures FOLDER] [--image_tokenizer FILE] [--port PORT]

MODEL is a model folder, a run's folder (its newest checkpoint, also while it trains), or a checkpoint; several share
the page, such as a pretrained one and what was fine-tuned from it. A tab that none of them serves for says why:

    Ask                 fine-tuned for vqa or open_vqa
    Caption             fine-tuned for captioning, or pretrained by prefix_language_modeling
    Search, Classify    fine-tuned for retrieval, or pretrained by contrastive; Search looks into --pictures
    Fill in words       pretrained by masked_data_modeling; with a picture or without
    Attention           any; with words, in a model with layers of fusion, those layers
    Hidden patches      pretrained by masked_data_modeling; --pictures tell what visual codes look like

The page is served to 127.0.0.1 alone and asks no other host for anything. It needs Gradio: pip install
'beit3-dist[page]'. Ctrl-C ends it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from beit3_dist.command_line import importing, refusing
from beit3_dist.config import require

PROGRAM = "demo.py"


def parse_arguments(arguments: list[str] | None) -> Namespace:
    """The command line. Raises ValueError for what cannot be; exits with code 2 on anything else wrong."""
    parser = ArgumentParser(PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="model folder, run or checkpoint")
    text = "folder of images to search, which also tell what visual codes look like"
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help=text)
    text = "that the model was pretrained with (default: the file that the run names)"
    parser.add_argument("--image_tokenizer", type=Path, metavar="FILE", help=text)
    text = "SentencePiece file of models that bring none"
    parser.add_argument("--text_tokenizer", type=Path, metavar="FILE", help=text)
    parser.add_argument("--port", type=int, default=8322, help="8322; 0 takes a free one")
    parser.add_argument("--cache", default="~/.cache/beit3_dist", help="folder of the images' vectors")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; the first GPU where there is one")
    options = parser.parse_args(arguments)
    if options.pictures is not None:
        require(options.pictures.is_dir(), f"--pictures {options.pictures} is no folder")
    for name in ("image_tokenizer", "text_tokenizer"):
        path = getattr(options, name)
        require(path is None or path.is_file(), f"--{name} {path}: there is no such file")
    for path in options.models:
        require(path.exists(), f"there is no {path}")
    return options


def tell(line: str) -> None:
    print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    with refusing(PROGRAM):
        options = parse_arguments(arguments)
        with importing():
            from beit3_dist.reports.live import HOST
            from beit3_dist.use.page import application, gradio, serve, server_of
            from beit3_dist.use.served import open_models
        with gradio() as gr:
            models = open_models(
                options.models, options.pictures, options.image_tokenizer, options.text_tokenizer, options.cache,
                options.device, tell,
            )  # fmt: skip
            server, place = server_of(application(gr, models), options.port)
            address = f"http://{HOST}:{place.getsockname()[1]}/"
            print(f"{address} serves {', '.join(models.opened)}; Ctrl-C ends it", flush=True)
            serve(server, place)


if __name__ == "__main__":
    main()
