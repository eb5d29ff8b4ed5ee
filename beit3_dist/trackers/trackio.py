"""Trackio: a local database, which its own program shows; `TRACKIO_DIR` says where."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from beit3_dist.trackers.base import Recorded, Tracker, numbers


@dataclass(frozen=True, kw_only=True)
class TrackioConfig:
    """The section trackers' {trackio: ...}."""

    project: str = "beit3"
    """Project; it is made where there is none."""
    name: str = ""
    """What the run is called, by which it is known again; empty: as its folder is."""


class Trackio(Tracker):
    """A run is known again by its name."""

    name = "trackio"
    Config = TrackioConfig
    module = "trackio"

    def __init__(self, config: TrackioConfig, run: Recorded) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((run.folder / "trackio").absolute()))
        self._trackio = trackio = importlib.import_module("trackio")
        self._run = trackio.init(
            project=config.project,
            name=run.identity(self.name, lambda: config.name or run.name)[0],
            resume="allow",
            config={**run.config, "hashes": dict(run.hashes)},
            embed=False,
        )

    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        told = {"sample_hash": record["sample_hash"]} if "sample_hash" in record else {}
        self._run.log({**numbers(kind, record), **told}, step=record["step"])

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: text}, step=step)

    def image(self, step: int, name: str, image: Tensor) -> None:
        self._run.log({name: self._trackio.Image(image.permute(1, 2, 0).numpy())}, step=step)

    def close(self) -> None:
        self._run.finish()
