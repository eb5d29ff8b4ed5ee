"""The profile of a run's steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from beit3_dist.train.profiling import SKIPPED, profiled

CPU = torch.device("cpu")


def train(profiling: AbstractContextManager[Callable[[], None]], steps: int) -> None:
    with profiling as step_has_ended:
        for step in range(steps):
            torch.ones(step + 1, 3) @ torch.ones(3, 2)  # the number of rows tells the step
            step_has_ended()


@pytest.mark.parametrize(("steps", "run"), [(2, 8), (5, SKIPPED + 1)], ids=["some", "until the run ends"])
def test_trace_and_table(steps: int, run: int, tmp_path: Path) -> None:
    train(profiled(steps, tmp_path / "profile", CPU), run)
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    products = [event for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert len(products) == min(steps, run - SKIPPED), "the first steps are left out, and all after the last"
    assert "aten::mm" in (tmp_path / "profile" / "kernels.txt").read_text()


def test_nothing_is_profiled_unless_asked_for(tmp_path: Path) -> None:
    train(profiled(0, tmp_path / "profile", CPU), 4)
    assert not (tmp_path / "profile").exists()
