#!/usr/bin/env python3
"""Shows what a pretraining run has learnt: RUN/report.png, RUN/report.json and a summary on the terminal.

    python tools/report.py RUN [--out PNG] [--pictures N]
    python tools/report.py RUN [RUN ...] --html FILE     one page, several runs over one another
    python tools/report.py RUN [RUN ...] --live          the same on 127.0.0.1, following runs that go on

The yardstick of each loss is the entropy of its targets, in nats: the loss of a model that knows how often each code or
word is hidden, and nothing of the context. A loss below it means that the model reads the context. The yardstick of
each accuracy is the share of the most frequent target. Both are measured on the first 2,048 training samples of each
stream, as the run crops and masks them.

Hidden patches are drawn from codes: a code looks like the mean of all sampled training patches that carry it. The row
drawn from the true codes is the best that the image tokenizer allows; no model can get past it.

report.json lies beside the PNG. LOSS is image, text, pair_image, pair_text or what other objectives name; a number
that does not exist is null:

    run, checkpoint, checkpoint_step            the folder, the checkpoint whose weights draw the images, its step
    steps, planned_steps, wall_s                steps in metrics.jsonl, of the whole run; sum of the steps' seconds
    samples {images, texts, pairs}              samples seen
    sets {STREAM.NAME: count}                   of them those of each named data set of a mixture
    samples_per_s, data_wait_share              over all steps
    losses, accuracies {LOSS: {first, last, held_out}}   first step, mean of the last 20 steps, last validation
    entropies, baselines {LOSS: number}       of the targets, as above; nats and a share
    targets {LOSS: count}, sampled {images, texts, pairs}   masked positions and samples that these come from
    held_out_step                               step of the last validation
    zero_shot {NAME: number}                    what it has scored beside losses and accuracies
    pictures                                    "held-out" or "training": which samples are drawn
    collapsed                                   what is to be said of streams whose targets are all but one
    codes_right {image, pair_image}             share of the drawn images' hidden patches whose code is guessed
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from beit3_dist.checkpoint.files import write_json, write_text
from beit3_dist.command_line import refusing
from beit3_dist.config import require
from beit3_dist.devices import device_type
from beit3_dist.reports.examples import examples
from beit3_dist.reports.figure import MOST_IMAGES, draw, matplotlib
from beit3_dist.reports.live import HOST, serve
from beit3_dist.reports.opened import open_run
from beit3_dist.reports.page import Shown, contents, names_of, page
from beit3_dist.reports.summary import summarize, summary_lines
from beit3_dist.reports.targets import sample_training

PROGRAM = "report.py"


def parse_arguments(arguments: list[str] | None) -> Namespace:
    """The command line. Raises ValueError for what cannot be; exits with code 2 on anything else wrong."""
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run; several with --html or --live"
    )
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture to write; RUN/report.png")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write one page of HTML, which needs no network, instead"
    )
    parser.add_argument("--live", action="store_true", help=f"serve that page on {HOST}, and follow the runs")
    parser.add_argument("--port", type=int, default=8321, metavar="PORT", help="of --live; 8321, 0 takes a free one")
    text = f"examples of each kind, 1 to {MOST_IMAGES}; 8. A page needs neither data nor checkpoints with 0"
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help=text)
    text = "files that define objectives of the run"
    parser.add_argument("--plugins", nargs="*", default=[], metavar="FILE", help=text)
    options = parser.parse_args(arguments)
    is_page = options.live or options.html is not None
    require(not (options.live and options.html), "--live serves a page and --html writes one: name one of them")
    require(is_page or len(options.runs) == 1, "several runs are shown by --html FILE or --live: add one of them")
    require(not (is_page and options.out), "--out names a picture: leave it out beside --html and --live")
    fewest = 0 if is_page else 1
    in_bounds = fewest <= options.pictures <= MOST_IMAGES
    require(in_bounds, f"--pictures {options.pictures} is not in {fewest} to {MOST_IMAGES}")
    written, option = (options.html, "--html") if is_page else (options.out, "--out")
    for folder in options.runs if is_page else ():
        require(folder.is_dir(), f"there is no run folder {folder}")
    if written is None and not is_page:
        written = options.out = options.runs[0] / "report.png"
    if written is not None:
        endings = (".html", ".htm") if is_page else (".png",)
        require(written.suffix in endings, f"{option} {written} does not end in {endings[0]}")
        if options.runs[0].is_dir() and not written.parent.is_dir():
            raise ValueError(f"{option} {written}: there is no folder {written.parent}")
    return options


def main(arguments: list[str] | None = None) -> None:
    with refusing(PROGRAM):
        options = parse_arguments(arguments)
        if options.live or options.html is not None:
            show(options)
            return
        matplotlib("figure")
        run = open_run(options.runs[0], PROGRAM, options.plugins)
        require(bool(run.metrics), f"{run.folder} has not trained yet")
        device = torch.device(device_type())
        sample = sample_training(run, device)
        shown = examples(run, device, options.pictures)
        report = summarize(run, sample, shown)
        draw(run, report, sample.patches, shown).savefig(options.out)
        as_json = options.out.with_suffix(".json")
        write_json(as_json, report)
    print("\n".join(summary_lines(run, report)))
    print(f"{options.out}\n{as_json}")


def show(options: Namespace) -> None:
    """Writes the page of the runs, or serves it while they go on."""
    device, names = torch.device(device_type()), names_of(options.runs)
    runs = [
        Shown(folder, name, options.pictures, device, PROGRAM) for folder, name in zip(options.runs, names, strict=True)
    ]
    for run in runs:
        run.read()
        run.look(options.plugins)
    if options.live:
        serve(runs, options.plugins, options.port)
    else:
        write_text(options.html, page(contents(runs)))
        print(f"{options.html}: {options.html.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
