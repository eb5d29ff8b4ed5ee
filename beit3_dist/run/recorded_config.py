"""The config that a run has written into its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from beit3_dist.command_line import configured
from beit3_dist.config import RunConfig, require
from beit3_dist.objectives import SECTIONS
from beit3_dist.opening import read_yaml


def pretraining_config(folder: Path, program: str, plugins: Sequence[str] = ()) -> RunConfig:
    """The config of a pretraining run. `plugins`: those that the user names; what the folder names is not imported,
    since it may be somebody else's. `program`: who asks. Raises ValueError where the folder is none of a run, or of
    another kind of run, and for a config that this version refuses."""
    recipe = folder / "config.yaml"
    require(recipe.is_file(), f"{folder} is not a run folder: it has no config.yaml")
    if not {"objective", "objectives"} & read_yaml(recipe).keys():
        raise ValueError(f"{folder} is no pretraining run: its config.yaml has no objectives")
    arguments = ["--config", str(recipe), *(f"--plugins={plugin}" for plugin in plugins)]
    return configured(RunConfig, program, "", arguments, SECTIONS, trusted=False)
