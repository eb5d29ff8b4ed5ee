"""Weights & Biases: online, or offline into OUT/wandb/, which `wandb sync` sends later."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from beit3_dist.config import require
from beit3_dist.trackers.base import Recorded, Tracker, numbers


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """The section trackers' {wandb: ...}."""

    project: str = "beit3"
    """Project; it is made where there is none."""
    entity: str = ""
    """Team or user; empty: the one that is logged in."""
    name: str = ""
    """What the run is called; empty: as its folder is."""
    mode: str = "online"
    """online, or offline, which needs no network."""

    def __post_init__(self) -> None:
        require(self.mode in ("online", "offline"), f"trackers.wandb.mode={self.mode!r} is not one of online, offline")


class Wandb(Tracker):
    """Curves lie over their field `step`: a run that has gone back draws its steps once more."""

    name = "wandb"
    Config = WandbConfig
    module = "wandb"

    def __init__(self, config: WandbConfig, run: Recorded) -> None:
        self._wandb = wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=config.project,
            entity=config.entity or None,
            name=config.name or run.name,
            mode=config.mode,
            id=run.identity(self.name, lambda: uuid.uuid4().hex[:12])[0],
            resume="allow",
            dir=str(run.folder),
            config={**run.config, "hashes": dict(run.hashes)},
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, disable_code=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        told = {"sample_hash": record["sample_hash"]} if "sample_hash" in record else {}
        self._run.log({"step": record["step"], **numbers(kind, record), **told})

    def text(self, step: int, name: str, text: str) -> None:
        table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({"step": step, name: table})

    def image(self, step: int, name: str, image: Tensor) -> None:
        self._run.log({"step": step, name: self._wandb.Image(image.permute(1, 2, 0).numpy())})

    def close(self) -> None:
        self._run.finish()
