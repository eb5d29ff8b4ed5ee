"""The config that a run has written into its folder."""

from __future__ import annotations

from pathlib import Path

from beit3_dist.command_line import parse
from beit3_dist.config import RunConfig
from beit3_dist.opening import read_yaml


def pretraining_config(folder: Path, program: str) -> RunConfig:
    """The config of a pretraining run. Raises ValueError where the folder is none of a run, or of another kind of run;
    a config that this version refuses ends `program`."""
    recipe = folder / "config.yaml"
    if not recipe.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml")
    if "objective" not in read_yaml(recipe):
        raise ValueError(f"{folder} is no pretraining run: its config.yaml has no objective of masked data modelling")
    return parse(RunConfig, program, "", ["--config", str(recipe)])
