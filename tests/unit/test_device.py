"""What torch and Python are told before and while a run computes."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from beit3_dist.parallel.device import ALLOCATOR, WORKSPACE, prepare_device
from beit3_dist.train import garbage
from beit3_dist.train.garbage import GarbageCollection


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (ALLOCATOR, WORKSPACE):
        monkeypatch.setenv(name, "")  # so that it is brought back
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_deterministic_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    prepare_device(False)
    assert not torch.are_deterministic_algorithms_enabled() and WORKSPACE not in os.environ
    prepare_device(True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ[WORKSPACE] == ":4096:8"


def test_what_the_environment_says_of_the_allocator_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv(ALLOCATOR, "max_split_size_mb:64")
    prepare_device(False)
    assert os.environ[ALLOCATOR] == "max_split_size_mb:64"


def test_garbage_is_collected_at_chosen_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "EVERY", 3)
    collected: list[int] = []
    with GarbageCollection() as collection:
        assert not gc.isenabled()
        monkeypatch.setattr(garbage.gc, "collect", lambda: collected.append(1))
        for step in range(1, 8):
            collection.after(step)
    assert gc.isenabled() and len(collected) == 2


def test_what_was_frozen_before_a_run_stays_so() -> None:
    try:
        for frozen in (False, True):
            gc.freeze() if frozen else gc.unfreeze()
            with GarbageCollection():
                assert gc.get_freeze_count()
            assert bool(gc.get_freeze_count()) == frozen
    finally:
        gc.freeze()
