"""`--profile` of a run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.runs import run_config, train
from tests.parallel.workers import run_workers


def test_a_run_profiles_the_steps_that_it_was_asked_for(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=5, profile=2)
    assert run_workers(1, train, config) == [""]
    folder = Path(config.out) / "profile"
    trace = json.loads((folder / "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2
    assert "scaled_dot_product" in (folder / "kernels.txt").read_text()
