"""A process that is killed again and again, at any moment, ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.killing import kill_at_random

KILLS = 20


@pytest.mark.slow
def test_killed_twenty_times_at_random(tmp_path: Path) -> None:
    """`python -m tests.attack` does so a hundred times."""
    result = kill_at_random(tmp_path, KILLS)
    result.check()
    assert result.steps_by_kill[-1] > KILLS / 2, f"hardly a step between the kills: {result.steps_by_kill}"
    assert result.moments["starting"] and result.moments["training"]
