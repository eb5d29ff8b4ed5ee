"""TensorBoard: OUT/tensorboard/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from beit3_dist.opening import naming
from beit3_dist.trackers.base import Recorded, Tracker, numbers


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """It has no settings."""


class TensorBoard(Tracker):
    """Of each stretch of a run a file; steps after which a run has gone back are purged."""

    name = "tensorboard"
    Config = TensorBoardConfig
    module = "tensorboard"
    in_folder = True

    def __init__(self, config: TensorBoardConfig, run: Recorded) -> None:
        self._folder = run.folder / "tensorboard"
        with naming(self._folder):
            self.writer = SummaryWriter(str(self._folder), purge_step=run.step + 1)  # inclusive

    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        """Its thread reports a full disk at a later call."""
        with naming(self._folder):
            for name, value in numbers(kind, record).items():
                self.writer.add_scalar(name, value, record["step"])

    def text(self, step: int, name: str, text: str) -> None:
        with naming(self._folder):
            self.writer.add_text(name, text, step)

    def image(self, step: int, name: str, image: Tensor) -> None:
        with naming(self._folder):
            self.writer.add_image(name, image, step)

    def close(self) -> None:
        with naming(self._folder):
            self.writer.close()
