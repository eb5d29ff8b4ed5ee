"""Where the host waits for the GPU in a training step, by torch's own account."""

from __future__ import annotations

import pytest

from tests.parallel.test_waits import check_one_wait


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_step_waits_once(zero_stage: int) -> None:
    check_one_wait(zero_stage, "bf16")
