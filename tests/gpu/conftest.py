"""Tests of tests/gpu/run.sh, which names the device; elsewhere they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.workers import KeptWorkers

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "BEIT3_TEST_DEVICE" in os.environ:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="for one GPU: bash tests/gpu/run.sh"))


@pytest.fixture(scope="module")
def workers() -> Iterator[KeptWorkers]:
    """One process, for all cases of a file."""
    kept = KeptWorkers()
    yield kept
    kept.close()
