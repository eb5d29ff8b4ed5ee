"""`--profile` of a run."""

from __future__ import annotations

import json
from pathlib import Path

from beit3_dist.train.profiling import TOP_KERNELS
from tests.integration.runs import run_config, train
from tests.parallel.workers import run_workers


def test_a_run_profiles_the_steps_that_it_was_asked_for(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=5, profile=2)
    assert run_workers(1, train, config) == [""]
    folder = Path(config.out) / "profile"
    trace = json.loads((folder / "trace.json").read_text())
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert len([name for name in names if name.startswith("ProfilerStep")]) == 2
    assert any("scaled_dot_product" in name for name in names)
    # Which forty took longest in so small a model changes with the machine's load: each is one of the trace's.
    rows = (folder / "kernels.txt").read_text().splitlines()[3:]
    listed = [row[:80].strip().rstrip(".*") for row in rows if row and not row.startswith(("---", "Self CPU"))]
    assert len(listed) == TOP_KERNELS and all(any(name.startswith(row) for name in names) for row in listed)
