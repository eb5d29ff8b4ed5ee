"""One file of HTML that shows runs, over one another where there are several, and needs no network.

Whatever comes from a run (captions, names, values of its recipe) lies in the page as JSON whose < are escaped, and the
script puts it in as text. The page's policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3_dist.checkpoint.find import find
from beit3_dist.config import DataConfig
from beit3_dist.data.faults import BadSample
from beit3_dist.data.transforms import read_image
from beit3_dist.opening import read_text, read_yaml
from beit3_dist.reports.contents import RunContents
from beit3_dist.reports.examples import examples
from beit3_dist.reports.opened import Run, open_run
from beit3_dist.reports.targets import TrainingSample, baseline, sample_training, watched
from beit3_dist.train.guesses import Example, codes_right, tiles
from beit3_dist.train.target_watch import collapse, entropy

QUALITY = 88
"""Of the pictures' WebP."""
MOST_DRAWN = 16
"""Pictures of a validation that are shown."""


class Shown:
    """A run on a page: what its folder tells and, where a model can be looked at, what that makes of examples."""

    def __init__(self, folder: Path, name: str, pictures: int, device: torch.device, program: str) -> None:
        """`pictures`: examples of each kind; 0: no model is opened. Raises ValueError for a folder of no run."""
        self._contents, self._name = RunContents(folder), name
        self._number, self._device, self._program = pictures, device, program
        self._sample: TrainingSample | None = None
        self._checkpoint: Path | None = None
        self._there, self._told = True, dict[str, Any]()
        self._pictured: dict[str, Any] = {"why": self._reason()}

    def read(self) -> bool:
        """Reads what the run has written since. Whether there was anything, or its folder has gone or come back."""
        before, self._there = self._there, self._contents.folder.is_dir()
        return (self._there and self._contents.read()) or before != self._there

    def look(self, plugins: Sequence[str] = ()) -> bool:
        """Has the newest checkpoint's model make the pictures anew, where it is another one. Whether it was. Raises
        ValueError or OSError where the run's data or tokenizers are not there."""
        folder = self._contents.folder
        if not self._there:
            return False
        checkpoint = find("auto", folder / "checkpoints")
        if self._reason() or checkpoint == self._checkpoint:
            return False
        run = open_run(folder, self._program, plugins)
        self._sample = self._sample or sample_training(run, self._device)  # the same whatever the weights
        self._pictured, self._checkpoint = pictured(run, self._sample, self._device, self._number), run.checkpoint
        return True

    def _reason(self) -> str:
        """Why there are no pictures; empty where there can be some."""
        folder = self._contents.folder
        if self._number == 0:
            return "No pictures were asked for."
        if not {"objective", "objectives"} & read_yaml(folder / "config.yaml").keys():
            return "Pictures are drawn of pretraining runs, and this is none."
        if find("auto", folder / "checkpoints") is None:
            return "There are no pictures yet: they come with the first checkpoint."
        return ""

    def told(self) -> dict[str, Any]:
        """For the page, as JSON can hold it; of a folder that is gone, what it told last."""
        if self._there:
            told = self._contents.told(self._name) | self._pictured | {"drawn": drawn(self._contents.folder)}
            self._told = told | {"pictures_version": str(self._checkpoint)}
        return self._told | {"gone": not self._there}


def pictured(run: Run, sample: TrainingSample, device: torch.device, number: int) -> dict[str, Any]:
    """What a page shows of a model: losses by their titles, yardsticks, examples."""
    shown, looks = examples(run, device, number), sample.patches
    return {
        "why": "",
        "checkpoint_step": run.step,
        "pictures": "held-out" if run.shown.held_out else "training",
        "losses": {
            loss.name: {"title": loss.title, "unit": loss.unit, "nats": bool(loss.classes)}
            for loss in run.objectives.told
        },
        "entropies": {name: entropy(counts) for name, counts in sample.counts.items()},
        "baselines": {name: baseline(counts) for name, counts in sample.counts.items()},
        "collapsed": [words for loss in watched(run) if (words := collapse(loss, sample.counts[loss.name]))],
        "codes_right": {name: codes_right(some) for name, some in shown.items()},
        "examples": {name: [shown_example(one, looks) for one in some] for name, some in shown.items()},
    }


def shown_example(example: Example, looks: Tensor | None) -> dict[str, Any]:
    """An example's images and its caption with the guesses. `looks`: uint8 [codes, 3, p, p]."""
    assert looks is not None
    return {
        "tiles": [_as_url(tile) for tile in tiles(example, looks)],
        "caption": [[piece.text, piece.guess] for piece in example.caption],
    }


def drawn(folder: Path) -> list[str]:
    """What a fine-tuning run's last validation has drawn (segmentation): RUN/pictures, as data URLs."""
    urls = []
    for number in range(MOST_DRAWN):
        with suppress(BadSample, OSError):  # there are fewer, or it is being written
            picture = read_image(folder / "pictures" / f"{number}.png", DataConfig.max_pixels)
            urls.append(_as_url(np.asarray(picture)))
    return urls


def _as_url(image: Any) -> str:
    """uint8 [S, S, 3] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def names_of(folders: Sequence[Path]) -> list[str]:
    """What runs are called on a page: the last parts of their paths, as many as tell them apart, and two where the last
    one is "run", which tells nothing."""
    parts = [folder.absolute().parts for folder in folders]
    shortest = 1 + any(some[-1:] == ("run",) for some in parts)
    for length in range(shortest, max(map(len, parts)) + 1):
        names = ["/".join(some[-length:]) for some in parts]
        if len({*names}) == len(names):
            break
    return names


def contents(runs: Sequence[Shown], live: bool = False) -> dict[str, Any]:
    """All that a page shows."""
    made = time.strftime("%Y-%m-%d %H:%M")
    return {"runs": [run.told() for run in runs], "live": live, "made": made, "now": time.time(), "version": ""}


def page(shown: dict[str, Any]) -> str:
    """The whole file."""
    names = [run["name"] for run in shown["runs"]]
    title = f"What {names[0]} has learnt" if len(names) == 1 else f"{len(names)} runs: {', '.join(names)}"
    style, script = asset("page.css"), asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        f"connect-src {chr(39)}{'self' if shown['live'] else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )
    return Template(asset("page.html")).substitute(
        policy=policy, title=html.escape(in_utf8(title)), style=style, script=script, data=as_script_data(shown)
    )


def as_script_data(value: Any) -> str:
    """JSON that ends no script element, whatever its texts are. Raises ValueError for a number that is not finite."""
    text = in_utf8(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def in_utf8(text: str) -> str:
    """The text with \\udcXX, which is JSON's way, too, for a byte that is no letter: names of files may hold some."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@cache
def asset(name: str) -> str:
    """A file that lies beside this one."""
    return read_text(Path(__file__).with_name(name))


def _digest(text: str) -> str:
    """How a policy names the one script or style that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
