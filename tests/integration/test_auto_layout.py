"""A run whose layout the planner finds."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from tests.integration.runs import metrics, run_config, write_recipe
from tests.launching import launch


def test_a_resumed_run_goes_on_in_the_layout_that_is_found(tmp_path: Path) -> None:
    """The same samples in the same steps, whoever shares them out."""
    config = run_config(tmp_path)
    recipe = write_recipe(config, tmp_path / "recipe.yaml")
    assert launch("pretrain", "--config", str(recipe)).returncode == 0
    whole = metrics(config.out)
    for step in (8, 12):
        shutil.rmtree(Path(config.out, "checkpoints", f"step_{step:07}"))
    options = ("--batch.accumulation", "auto", "--parallel.tensor", "auto", "--parallel.zero_stage", "auto")
    went_on = launch("pretrain", "--config", str(recipe), "--checkpoint.resume", "auto", *options)
    assert went_on.returncode == 0, went_on.stderr
    assert "auto: parallel.tensor=1, parallel.zero_stage=" in went_on.stderr
    found = yaml.safe_load(Path(config.out, "config.yaml").read_text())
    assert found["batch"]["accumulation"] == 1 and found["parallel"]["tensor"] == 1  # 24 GB for a million parameters
    assert [(r["step"], r["sample_hash"]) for r in metrics(config.out)] == [
        (r["step"], r["sample_hash"]) for r in whole
    ]
