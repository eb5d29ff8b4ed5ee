#!/usr/bin/env python3
"""Shows what a pretraining run has learnt: RUN/report.png, RUN/report.json and a summary on the terminal.

    python tools/report.py RUN [--out PNG] [--pictures N]

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

import json
import math
import textwrap
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from beit3_dist.checkpoint.files import write_json
from beit3_dist.checkpoint.find import find, read_state
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.command_line import refusing
from beit3_dist.config import STREAMS, BatchConfig, RunConfig, require
from beit3_dist.data.batch import MicroBatch, MixedBatches, Request, requests_from
from beit3_dist.data.text import TextTokenizer
from beit3_dist.data.views import SeenImages
from beit3_dist.devices import device_type
from beit3_dist.image_tokenizer.drawing import mosaic, patches_of
from beit3_dist.image_tokenizer.files import load_vqkd
from beit3_dist.image_tokenizer.network import VQKD
from beit3_dist.image_tokenizer.targets import ImageTargets, tokenizer_view_size
from beit3_dist.model.beit3 import BEiT3
from beit3_dist.objectives.base import Loss
from beit3_dist.objectives.masked_data_modeling import MaskedDataModeling
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import Objectives
from beit3_dist.opening import open_regular
from beit3_dist.optional import optional_module
from beit3_dist.run.recorded_config import pretraining_config
from beit3_dist.train.target_watch import collapse, entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROGRAM = "report.py"
SAMPLES = 2048
"""Training samples of each stream that the entropies, the baselines and the looks of the codes come from."""
SAMPLES_AT_ONCE = 32
"""Of each stream. A sample does not depend on its batch, so this bounds the memory and changes nothing else."""
LAST_STEPS = 20

Record = dict[str, Any]


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder and what its config names, opened and checked."""

    folder: Path
    config: RunConfig
    metrics: list[Record]
    evaluations: list[Record]
    checkpoint: Path
    step: int
    objectives: Objectives
    image_tokenizer: VQKD | None
    """None: no objective has visual codes."""
    train: MixedBatches
    """The training streams, `SAMPLES_AT_ONCE` samples of each at once."""
    shown: MixedBatches
    """The held-out streams, or the training streams of a run that names no held-out shards; one sample at once."""


def open_run(folder: Path, plugins: Sequence[str] = ()) -> Run:
    """Raises ValueError or OSError with one line where something is missing or does not fit."""
    config = pretraining_config(folder, PROGRAM, plugins)
    metrics = read_records(folder / "metrics.jsonl")
    require(bool(metrics), f"{folder} has no metrics.jsonl with a step in it: the run has not trained yet")
    checkpoint = find("auto", folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{folder / 'checkpoints'} holds no checkpoint yet: wait for step {config.checkpoint.every}")
    state = read_state(checkpoint, config.model)
    objectives, image_tokenizer, view_size = objectives_of(config), None, config.model.image_size
    if objectives.coded:
        image_tokenizer = load_vqkd(config.image_tokenizer)
        view_size = tokenizer_view_size(image_tokenizer, config.image_tokenizer, config.model)
    there = [name for name in STREAMS if getattr(config.batch, name)]
    has_held_out = all(getattr(config.eval, name) for name in there)

    def streams(at_once: int, held_out: bool) -> MixedBatches:
        # Nothing is trained here: a validation of the whole batch is none of this config's concern.
        batch = BatchConfig(**{name: at_once * (name in there) for name in STREAMS})
        return MixedBatches(replace(config, batch=batch), view_size, 0, 1, held_out, [*objectives])

    train, shown = streams(SAMPLES_AT_ONCE, held_out=False), streams(1, has_held_out)
    evaluations, of_run = read_records(folder / "eval.jsonl"), (objectives, image_tokenizer, train, shown)
    return Run(folder, config, metrics, evaluations, checkpoint, state.step, *of_run)


def read_records(path: Path) -> list[Record]:
    """The records of a JSON-lines file, none if there is no file. A last line that a crash cut short is left out."""
    records: list[Record] = []
    if not path.is_file():
        return records
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(json.loads(line))
            except ValueError:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}: line {number} is not JSON") from None
    return records


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """float64 [records]; a number that was not finite, null in the file, is NaN."""
    return np.array([record[name] for record in records], dtype=np.float64)


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSample:
    """What a sample of training batches says about the targets."""

    samples: int
    """Samples of each stream."""
    counts: dict[str, Tensor]
    """Loss -> int64 [classes]: how often each code or word is its target."""
    patches: Tensor | None
    """uint8 [codes, 3, p, p]: what each code looks like; None: there are no codes."""


@torch.no_grad()
def sample_training(run: Run, device: torch.device) -> TrainingSample:
    """Tallies the targets and the patches of the first `SAMPLES` training samples of each stream."""
    model = run.config.model
    counts = {loss.name: torch.zeros(loss.classes, dtype=torch.int64) for loss in watched(run)}
    sums = torch.zeros(model.visual_vocab_size, 3 * model.patch_size**2, dtype=torch.float64)
    carriers = torch.zeros(model.visual_vocab_size, dtype=torch.int64)
    number = math.ceil(SAMPLES / SAMPLES_AT_ONCE)
    for request in islice(requests_from((0, 0, 0), run.train.config.batch), number):
        batch = run.train[request]
        codes = codes_of(run, batch, device)
        _, reading, _ = run.objectives.prepare(batch, device, codes, embeds=False)
        assert reading is not None
        for loss, classes in run.objectives.classes(reading):
            if loss.name in counts:
                counts[loss.name] += torch.bincount(classes.cpu(), minlength=loss.classes)
        if codes is not None:
            pixels = patches_of(SeenImages(batch, torch.device("cpu")).model, model.patch_size).flatten(1).double()
            sums.index_add_(0, codes.cpu().flatten(), pixels)
            carriers += torch.bincount(codes.cpu().flatten(), minlength=len(carriers))
    if run.image_tokenizer is None:
        return TrainingSample(number * SAMPLES_AT_ONCE, counts, None)
    codebook = run.image_tokenizer.quantize.embedding.weight.cpu()
    patches = mean_patches(sums, carriers, codebook).unflatten(1, (3, model.patch_size, model.patch_size))
    return TrainingSample(number * SAMPLES_AT_ONCE, counts, patches)


def watched(run: Run) -> list[Loss]:
    """The losses whose targets are classes."""
    return [loss for loss in run.objectives.losses if loss.classes]


def codes_of(run: Run, batch: MicroBatch, device: torch.device) -> Tensor | None:
    """int64 [I, patches] on the device; None where there are no codes."""
    if run.image_tokenizer is None:
        return None
    return ImageTargets(run.image_tokenizer, device)(SeenImages(batch, device).tokenizer)


def mean_patches(sums: Tensor, carriers: Tensor, codebook: Tensor) -> Tensor:
    """The mean patch of each code: uint8 [K, values] from sums [K, values], numbers of patches [K], codebook [K, C]. A
    code without a patch looks like the code with patches that is nearest to it in the codebook."""
    used = carriers.nonzero().squeeze(1)
    nearest = used[torch.cdist(codebook, codebook[used]).argmin(1)]
    looks = torch.where(carriers > 0, torch.arange(len(carriers)), nearest)
    return (sums / carriers.clamp(min=1)[:, None]).round().byte()[looks]


# Guessing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """An image, with or without a caption, and what the model makes of its hidden parts."""

    image: Tensor
    """uint8 [3, S, S]."""
    hidden: Tensor
    """bool [patches]."""
    codes: Tensor
    """int64 [patches]: the true codes."""
    guesses: Tensor
    """int64 [patches]: the model's codes at hidden patches, the true ones elsewhere."""
    caption: str
    """Empty for an image of the image stream."""


@torch.no_grad()
def examples(run: Run, device: torch.device, number: int) -> dict[str, list[Example]]:
    """`number` examples each of the image stream and of pairs, where the run masks them, spread evenly over the shown
    streams."""
    masked = next((objective for objective in run.objectives if isinstance(objective, MaskedDataModeling)), None)
    if masked is None or not masked.coded:
        return {}
    model = run.objectives.build()
    model.load_state_dict(read_weights(run.checkpoint), assign=True)
    model.to(device).eval()
    images, _, pairs = run.shown.lengths()
    number = min(number, *(length for length in (images, pairs) if length))
    shown: dict[str, list[Example]] = {}
    for i in range(number):
        batch = run.shown[Request((i * images // number, 0, i * pairs // number), 0)]
        for name, example in guess(model, masked, batch, run, device).items():
            shown.setdefault(name, []).append(example)
    return shown


def guess(
    model: BEiT3, masked: MaskedDataModeling, batch: MicroBatch, run: Run, device: torch.device
) -> dict[str, Example]:
    """The examples of a micro-batch with one image, one pair or both, by the name of their loss."""
    codes = codes_of(run, batch, device)
    inputs, reading, _ = Objectives(run.config, [masked]).prepare(batch, device, codes)
    assert reading is not None and codes is not None
    hidden_MD = model.hidden(inputs)[reading.selection.rows]
    guessed = {name: some.cpu() for name, some in masked.guesses(model, hidden_MD, reading.targets[0]).items()}
    seen, found = SeenImages(batch, torch.device("cpu")), {}
    pixels, true = seen.by_stream(seen.model), seen.by_stream(codes.cpu())
    for stream, name in (("images", "image"), ("pairs", "pair_image")):
        if name in guessed:
            hidden, codes_P = batch.streams[stream].annotations[masked.name]["image_mask"][0], true[stream][0]
            filled = codes_P.masked_scatter(hidden, guessed[name])
            found[name] = Example(pixels[stream][0], hidden, codes_P, filled, "")
    if "pair_image" in found:
        samples = batch.streams["pairs"]
        assert samples.text is not None and samples.lengths is not None
        words = samples.text[0, : int(samples.lengths[0])]
        mask = samples.annotations[masked.name]["text_mask"][0, : len(words)]
        guesses = words.masked_scatter(mask, guessed.get("pair_text", words[:0]))
        caption = caption_of(run.shown.tokenizer, words, mask, guesses)
        found["pair_image"] = replace(found["pair_image"], caption=caption)
    return found


def caption_of(tokenizer: TextTokenizer, words: Tensor, mask: Tensor, guesses: Tensor) -> str:
    """The caption without <s> and </s>: words as they are, hidden ones as [guess] where it is right and else as
    [guess→truth]."""
    result = ""
    for true, hidden, guessed in zip(words.tolist()[1:-1], mask.tolist()[1:-1], guesses.tolist()[1:-1], strict=True):
        piece, guess = spelled(tokenizer, true), spelled(tokenizer, guessed)
        told = piece.strip() if guessed == true else f"{guess.strip()}→{piece.strip()}"
        result += f"{' ' * piece.startswith(' ')}[{told}]" if hidden else piece
    return result.strip()


def spelled(tokenizer: TextTokenizer, word: int) -> str:
    """A word id as text, with a space in front where it begins a word."""
    if word in tokenizer.words:
        return tokenizer.model.id_to_piece(word - 1).replace("\u2581", " ")
    names = {tokenizer.bos: "<s>", tokenizer.pad: "<pad>", tokenizer.eos: "</s>", tokenizer.unk: "<unk>"}
    return f" {names.get(word, '<spare>')}"


# Summary --------------------------------------------------------------------------------------------------------------


def summarize(run: Run, sample: TrainingSample, shown: dict[str, list[Example]]) -> Record:
    wall = float(column(run.metrics, "step_s").sum())
    samples = {name: int(column(run.metrics, name).sum()) for name in STREAMS}

    def course(name: str) -> Record:
        values, held_out = column(run.metrics, name), column(run.evaluations[-1:], name)
        course = {"first": values[0], "last": values[-LAST_STEPS:].mean(), "held_out": (*held_out, math.nan)[0]}
        return {when: float(value) if math.isfinite(value) else None for when, value in course.items()}

    return {
        "run": str(run.folder),
        "checkpoint": str(run.checkpoint),
        "checkpoint_step": run.step,
        "steps": run.metrics[-1]["step"],
        "planned_steps": run.config.steps,
        "wall_s": wall,
        "samples": samples,
        "samples_per_s": sum(samples.values()) / wall,
        "data_wait_share": float(column(run.metrics, "data_wait_s").sum()) / wall,
        "losses": {loss.name: course(f"loss_{loss.name}") for loss in run.objectives.losses},
        "accuracies": {loss.name: course(f"acc_{loss.name}") for loss in run.objectives.losses if loss.has_accuracy},
        "entropies": {name: entropy(counts) for name, counts in sample.counts.items()},
        "baselines": {name: float(counts.max() / counts.sum()) for name, counts in sample.counts.items()},
        "targets": {name: int(counts.sum()) for name, counts in sample.counts.items()},
        "sampled": {name: sample.samples * bool(getattr(run.config.batch, name)) for name in STREAMS},
        "held_out_step": run.evaluations[-1]["step"] if run.evaluations else None,
        "zero_shot": zero_shot(run),
        "pictures": "held-out" if run.shown.held_out else "training",
        "collapsed": list(filter(None, (collapse(loss, sample.counts[loss.name]) for loss in watched(run)))),
        "codes_right": {name: codes_right(some) for name, some in shown.items()},
    }


def zero_shot(run: Run) -> dict[str, float]:
    """What the last validation has scored beside losses and their accuracies."""
    known = {"step", "loss", *(f"{of}_{loss.name}" for loss in run.objectives.losses for of in ("loss", "acc"))}
    return {name: value for record in run.evaluations[-1:] for name, value in record.items() if name not in known}


def codes_right(shown: list[Example]) -> float | None:
    """Share of the hidden patches whose code the model guesses; None where nothing is hidden."""
    hits = torch.cat([(example.guesses == example.codes)[example.hidden] for example in shown])
    return float(hits.float().mean()) if len(hits) else None


def summary_lines(run: Run, report: Record) -> Iterator[str]:
    """The report for a person at the terminal."""
    samples, sampled = report["samples"], report["sampled"]
    yield (
        f"{report['run']}: {report['steps']:,} of {report['planned_steps']:,} steps, {sum(samples.values()):,} samples "
        f"({', '.join(f'{count:,} {name}' for name, count in samples.items())})"
    )
    yield (
        f"{timedelta(seconds=round(report['wall_s']))} of training steps, {report['samples_per_s']:,.0f} samples/s, "
        f"{report['data_wait_share']:.1%} of the time waiting for data"
    )
    yield ""
    yield f"loss                first step   last {LAST_STEPS} steps        held-out        entropy of the targets"
    for kind in run.objectives.losses:
        loss, bound = report["losses"][kind.name], report["entropies"].get(kind.name)
        last, held_out = (f"{digits(loss[key], '7.3f')} {verdict(loss[key], bound):5}" for key in ("last", "held_out"))
        yield f"{kind.title:18}  {digits(loss['first'], '10.3f')}  {last:>14}  {held_out:>14}  {digits(bound, '24.3f')}"
    yield ""
    yield f"accuracy            first step   last {LAST_STEPS} steps        held-out    most frequent target's share"
    for kind in run.objectives.losses:
        if kind.has_accuracy:
            accuracy, share = report["accuracies"][kind.name], report["baselines"].get(kind.name)
            first, last, held_out = (digits(accuracy[key], "7.1%") for key in ("first", "last", "held_out"))
            yield f"{kind.title:18}  {first:>10}  {last:>8}        {held_out:>8}        {digits(share, '24.1%')}"
    yield ""
    yield from report["collapsed"]
    yield (
        f"The targets were counted at {sum(report['targets'].values()):,} masked positions of "
        f"{max(sampled.values()):,} training samples of each stream."
    )
    if report["held_out_step"] is not None:
        yield f"Held-out: the validation after step {report['held_out_step']:,}."
    for name, value in report["zero_shot"].items():
        yield f"{name:32}  {digits(value, '7.1%')}"


def digits(value: float | None, form: str) -> str:
    """A number, or a dash of the same width where there is none."""
    return "-".rjust(int(form.split(".")[0])) if value is None else format(value, form)


def verdict(loss: float | None, bound: float | None) -> str:
    return "" if loss is None or bound is None else "below" if loss < bound else "above"


# Figure ---------------------------------------------------------------------------------------------------------------

WIDTH, DPI = 1400, 100
"""Pixels of the figure's width, and pixels per inch. Every length below is in pixels, from the upper left corner."""
LEFT, MARGIN = 150, 24
"""Room for the rows' names, and the margin on the other sides."""
PANELS_LEFT, PANELS_TOP, PANELS_PITCH, PANELS_WIDTH, PANELS_HEIGHT = 62, 124, 340, 262, 250
PANELS_IN_A_ROW = 4
ROW_OF_PANELS = 306
"""Height of a row of panels; the images begin below the last one."""
GAP, LARGEST_TILE, HEADING = 8, 180, 56
"""Space between tiles, largest side of a tile, height of the heading above a block of tiles."""
CHARACTER, CAPTION_LINE, CAPTION_LINES = 7, 15, 6
"""Width of the captions' characters, height of a line, most lines."""
CAPTION_POINTS = CHARACTER / 0.602 * 72 / DPI
"""Size of their type: a character of DejaVu Sans Mono is 0.602 of its size wide."""
MOST_IMAGES = 12
GREY, GREY_EDGE = 150, 172
"""Levels of hidden patches and of two of their edges, which tell them from a grey image."""
COLORS = ("#0072b2", "#d55e00", "#008f68", "#b8488f")
INK, FAINT = "#222222", "#6b6b6b"
ROWS = (
    "original",
    "input, hidden\npatches in grey",
    "hidden patches\nas the model\nguesses them",
    "hidden patches\nfrom true codes:\nthe best possible",
)


def matplotlib(module: str) -> Any:
    """A module of matplotlib, which --help, and the tools that import this one, do without. Raises ValueError."""
    return optional_module(f"matplotlib.{module}", "a report's picture", "pip install -e '.[demo]' brings it")


def draw(run: Run, report: Record, looks: Tensor | None, shown: dict[str, list[Example]]) -> Figure:
    """The whole figure: the losses, and blocks of images and of pairs with their captions where there are any."""
    losses, most = run.objectives.losses, max(map(len, shown.values()), default=1)
    rows = math.ceil(len(losses) / PANELS_IN_A_ROW)
    tile = min(LARGEST_TILE, (WIDTH - LEFT - MARGIN - GAP * (most - 1)) // most)
    block, top = HEADING + len(ROWS) * (tile + GAP), PANELS_TOP + rows * ROW_OF_PANELS
    wrapped = partial(textwrap.fill, width=tile // CHARACTER, max_lines=CAPTION_LINES, placeholder="…")
    captions = [wrapped(pair.caption) for pair in shown.get("pair_image", [])]
    below = CAPTION_LINES * CAPTION_LINE * bool(captions) + 2 * MARGIN
    height = top + len(shown) * block + below
    figure = matplotlib("figure").Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0), autoscale_on=False)
    page.axis("off")
    draw_title(page, report)
    for number, loss in enumerate(losses):
        row, place = divmod(number, PANELS_IN_A_ROW)
        left, bottom = PANELS_LEFT + place * PANELS_PITCH, height - PANELS_TOP - row * ROW_OF_PANELS - PANELS_HEIGHT
        box = (left / WIDTH, bottom / height, PANELS_WIDTH / WIDTH, PANELS_HEIGHT / height)
        draw_losses(figure.add_axes(box), run, report, loss, COLORS[number % len(COLORS)])
    for name, some in shown.items():
        assert looks is not None
        part, kind = report["codes_right"][name], report["pictures"].capitalize()
        remark = "nothing is hidden" if part is None else f"{part:.0%} of the hidden codes guessed"
        if name == "pair_image":
            remark += "; hidden words of the caption as [guess], or [guess→truth] where it is wrong"
        page.plot([MARGIN, WIDTH - MARGIN], [top + 4, top + 4], color="#d0d0d0", linewidth=0.8)
        heading = f"{kind} {'pairs' if name == 'pair_image' else 'images'}"
        page.text(MARGIN, top + 38, heading, size=12.5, weight="bold", color=INK)
        page.text(WIDTH - MARGIN, top + 38, remark, size=10.5, color=FAINT, ha="right")
        draw_tiles(page, top + HEADING, tile, some, looks)
        top += block + (MARGIN if name == "image" else 0)
    for place, caption in enumerate(captions):
        left, monospaced = LEFT + place * (tile + GAP), {"family": "DejaVu Sans Mono", "size": CAPTION_POINTS}
        page.text(left, top + 4, caption, **monospaced, va="top", linespacing=1.25, color=INK, parse_math=False)
    return figure


def draw_title(page: Axes, report: Record) -> None:
    """What run this is, and what the lines of the curves mean."""
    page.text(MARGIN, 36, f"What {report['run']} has learnt", size=16, weight="bold", color=INK, parse_math=False)
    remark = (
        f"{report['steps']:,} of {report['planned_steps']:,} steps, {sum(report['samples'].values()):,} samples in "
        f"{timedelta(seconds=round(report['wall_s']))}; images drawn with the checkpoint of step "
        f"{report['checkpoint_step']:,}"
    )
    page.text(MARGIN, 60, remark, size=10.5, color=FAINT)
    line = partial(matplotlib("lines").Line2D, [], [], color=INK)
    bound = "entropy of the targets: the loss of knowing only how often each occurs"
    keys = [
        line(alpha=0.3, linewidth=0.8, label="training step"),
        line(linewidth=2, label="training, running mean"),
        line(linestyle="", marker="o", markersize=5, label="held-out"),
        line(linestyle="--", linewidth=1.4, label=bound),
    ]
    corner = (MARGIN - 6) / WIDTH, 1 - 66 / page.get_ylim()[0]
    legend = partial(page.legend, frameon=False, fontsize=9.5, handlelength=2.2, columnspacing=2.2, borderpad=0.2)
    legend(handles=keys, loc="upper left", bbox_to_anchor=corner, ncols=len(keys))


def draw_losses(axes: Axes, run: Run, report: Record, loss: Loss, color: str) -> None:
    """A loss over the steps, beside the entropy of its targets where they are classes."""
    bound = report["entropies"].get(loss.name)
    steps, losses = column(run.metrics, "step"), column(run.metrics, f"loss_{loss.name}")
    axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
    known = np.isfinite(losses)
    axes.plot(steps[known], running_mean(losses[known], max(1, len(losses) // 25)), color=color, linewidth=2)
    held_out = column(run.evaluations, "step"), column(run.evaluations, f"loss_{loss.name}")
    axes.plot(*held_out, "o", color=color, markersize=5, markeredgecolor="white", markeredgewidth=0.8, zorder=3)
    if bound is not None:
        axes.axhline(bound, color=color, linestyle="--", linewidth=1.4)
        beside = partial(axes.annotate, xycoords=axes.get_yaxis_transform(), xytext=(3, 0), textcoords="offset points")
        beside(f"{bound:.2f}", (1, bound), va="center", size=10, color=color, weight="bold")
    axes.set_title(loss.title, loc="left", size=12, color=color, weight="bold")
    axes.set_title(f"nats per {loss.unit}" if loss.classes else loss.unit, loc="right", size=9.5, color=FAINT)
    axes.set_xlabel("step", size=9.5, color=INK)
    axes.tick_params(labelsize=9, colors=FAINT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values up to each place, fewer at the beginning."""
    sums = np.concatenate([np.zeros(window), np.cumsum(values)])
    return (sums[window:] - sums[:-window]) / np.minimum(np.arange(len(values)) + 1, window)


def tiles(example: Example, looks: Tensor) -> list[np.ndarray]:
    """The original, the masked input, and the hidden patches from guessed and from true codes: uint8 [S, S, 3] each."""
    grey = torch.full_like(looks[:1], GREY)
    grey[..., 0, :] = grey[..., :, 0] = GREY_EDGE
    everywhere = torch.cat([torch.zeros_like(grey), torch.ones_like(grey)])
    hidden = mosaic(example.hidden[None].long(), everywhere)[0].bool()
    fills = ((torch.zeros_like(example.codes), grey), (example.guesses, looks), (example.codes, looks))
    filled = [torch.where(hidden, mosaic(codes[None], patches)[0], example.image) for codes, patches in fills]
    return [image.permute(1, 2, 0).numpy() for image in (example.image, *filled)]


def draw_tiles(page: Axes, top: float, tile: int, shown: list[Example], looks: Tensor) -> None:
    """A column of tiles for each example, and the rows' names."""
    rectangle = partial(matplotlib("patches").Rectangle, fill=False, edgecolor="#c8c8c8", linewidth=0.6)
    for row, title in enumerate(ROWS):
        page.text(MARGIN, top + row * (tile + GAP) + tile / 2, title, size=9.5, color=INK, va="center", linespacing=1.3)
    for number, example in enumerate(shown):
        for row, image in enumerate(tiles(example, looks)):
            left, upper = LEFT + number * (tile + GAP), top + row * (tile + GAP)
            page.imshow(image, extent=(left, left + tile, upper + tile, upper), aspect="auto")
            page.add_patch(rectangle((left, upper), tile, tile))


# Command line ---------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> Namespace:
    """The command line. Raises ValueError for what cannot be; exits with code 2 on anything else wrong."""
    parser = ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a pretraining run")
    parser.add_argument("--out", type=Path, metavar="PNG", help="picture to write; RUN/report.png")
    parser.add_argument("--pictures", type=int, default=8, metavar="N", help="examples of each kind; 8")
    text = "files that define objectives of the run"
    parser.add_argument("--plugins", nargs="*", default=[], metavar="FILE", help=text)
    options = parser.parse_args(arguments)
    options.out = options.out or options.run / "report.png"
    require(1 <= options.pictures <= MOST_IMAGES, f"--pictures {options.pictures} is not in 1 to {MOST_IMAGES}")
    require(options.out.suffix == ".png", f"--out {options.out} does not end in .png")
    if options.run.is_dir() and not options.out.parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
    return options


def main(arguments: list[str] | None = None) -> None:
    with refusing(PROGRAM):
        options = parse_arguments(arguments)
        matplotlib("figure")
        run = open_run(options.run, options.plugins)
        device = torch.device(device_type())
    sample = sample_training(run, device)
    shown = examples(run, device, options.pictures)
    report = summarize(run, sample, shown)
    draw(run, report, sample.patches, shown).savefig(options.out)
    as_json = options.out.with_suffix(".json")
    write_json(as_json, report)
    print("\n".join(summary_lines(run, report)))
    print(f"{options.out}\n{as_json}")


if __name__ == "__main__":
    main()
