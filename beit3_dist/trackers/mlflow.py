"""MLflow: a server or a store by its address, or the folder OUT/mlflow/."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from beit3_dist.trackers.base import Recorded, Tracker, flat, numbers

LONGEST, AT_ONCE = 500, 100
"""Letters of a parameter's value, and parameters of a request, that every store takes."""


@dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """The section trackers' {mlflow: ...}."""

    uri: str = ""
    """Address of the server (http://...) or of a database (sqlite:///..., which the whole package mlflow takes); empty:
    files in OUT/mlflow/."""
    experiment: str = "beit3"
    """Experiment; it is made where there is none."""
    name: str = ""
    """What the run is called; empty: as its folder is."""


class Mlflow(Tracker):
    """Fields as metrics, the recipe as parameters, and the recipe of each stretch as an artifact."""

    name = "mlflow"
    Config = MlflowConfig
    module = "mlflow"

    def __init__(self, config: MlflowConfig, run: Recorded) -> None:
        if not config.uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it warns of files elsewhere than here
        mlflow = importlib.import_module("mlflow")
        self._metric = mlflow.entities.Metric
        self._client = client = mlflow.MlflowClient(config.uri or (run.folder / "mlflow").absolute().as_uri())
        experiment = client.get_experiment_by_name(config.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(config.experiment)
        begin = partial(client.create_run, number, run_name=config.name or run.name)
        self._id, is_new = run.identity(self.name, lambda: begin().info.run_id)
        if is_new:
            parameters = [mlflow.entities.Param(name, value[:LONGEST]) for name, value in flat(run.config)]
            for first in range(0, len(parameters), AT_ONCE):
                client.log_batch(self._id, params=parameters[first : first + AT_ONCE])
        client.update_run(self._id, status="RUNNING")
        for name, value in flat(run.hashes):
            client.set_tag(self._id, f"hash.{name}", value)
        client.log_text(self._id, run.recipe, f"config_step_{run.step:07d}.yaml")
        self._sample_hash = ""

    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        now, step = int(time.time() * 1000), record["step"]
        metrics = [
            self._metric(name.replace("@", "_at_"), value, now, step) for name, value in numbers(kind, record).items()
        ]
        self._client.log_batch(self._id, metrics=metrics)
        self._sample_hash = record.get("sample_hash", self._sample_hash)
        if kind == "eval":
            self._client.set_tag(self._id, "sample_hash", self._sample_hash)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/step_{step:07d}.txt")

    def image(self, step: int, name: str, image: Tensor) -> None:
        self._client.log_image(self._id, image.permute(1, 2, 0).numpy(), key=name.replace("/", "."), step=step)

    def close(self) -> None:
        self._client.set_tag(self._id, "sample_hash", self._sample_hash)
        self._client.set_terminated(self._id)
