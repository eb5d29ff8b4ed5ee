"""A few of the faults of `python -m tests.faults`, which has all kinds and layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from beit3_dist.leaving import ExitCode
from tests.integration.disturbing import Spread, disturb


@pytest.mark.slow
def test_two_tensor_ranks_with_a_killed_one_and_a_full_disk(tmp_path: Path) -> None:
    result = disturb(tmp_path, Spread(1, tensor=2), 2, ("exit", "full disk"), seed=1)
    result.check()
    codes = {fault.kind: what.rpartition(" ")[2] for fault, what in result.faults}
    assert codes == {"exit": "137", "full disk": str(ExitCode.STOPPED.value)} and result.computed_alike
