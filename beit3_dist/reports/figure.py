"""The report as one picture, by matplotlib."""

from __future__ import annotations

import math
import textwrap
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from beit3_dist.objectives.base import Loss
from beit3_dist.optional import optional_module
from beit3_dist.reports.opened import Record, Run, column
from beit3_dist.reports.page import names_of
from beit3_dist.train.guesses import Example, in_brackets, tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    captions = [wrapped(in_brackets(pair.caption)) for pair in shown.get("pair_image", [])]
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
    (name,) = names_of([Path(report["run"])])
    page.text(MARGIN, 36, f"What {name} has learnt", size=16, weight="bold", color=INK, parse_math=False)
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
