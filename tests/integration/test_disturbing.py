"""A few of the faults of `python -m tests.faults`, which has all kinds and layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from beit3_dist.leaving import ExitCode
from tests.integration.disturbing import Spread, disturb


@pytest.mark.slow
def test_two_tensor_ranks_with_a_spoilt_gradient_a_slow_step_a_killed_one_and_a_full_disk(tmp_path: Path) -> None:
    result = disturb(tmp_path, Spread(1, tensor=2), 4, ("slow", "nan", "exit", "full disk"), seed=35)
    result.check()
    assert {met.fault.kind: met.became for met in result.met} == {
        "slow": "went on",
        "nan": "went on, the step was left out",
        "exit": "exit code 137, started again by the script",
        "full disk": f"exit code {ExitCode.STOPPED.value}, started again by hand",
    }
    assert [fault.kind for fault in result.lasting] == ["nan"] and result.apart_from is None
