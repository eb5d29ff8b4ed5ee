"""As test_zero.py, of compiled blocks: the compiler's minutes pass in a process of their own."""

from __future__ import annotations

import pytest

from tests.parallel.test_layouts import Layout, compare
from tests.parallel.workers import KeptWorkers


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_stage_equals_one_plain_process(zero_stage: int, workers: KeptWorkers) -> None:
    layout = Layout(zero_stage, "shallow", accumulation=2, steps=3, kernels="compiled")
    compare(layout.run(workers), layout)
