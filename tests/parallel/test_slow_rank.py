"""A rank that computes slowly is named in the log, and the times of all are in TensorBoard."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from beit3_dist.config import GuardConfig, RunConfig
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.preflight import prepare_run
from beit3_dist.train.pretraining import pretrain
from tests.integration.runs import run_config
from tests.parallel.workers import run_workers

SLOW_S = 0.5


def slowly(groups: Groups, config: RunConfig) -> str:
    """A run in which the forward passes of rank 1 take longer; what the log says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("beit3_dist").addHandler(handler)
    forward = PretrainingModule.forward

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW_S)
        return forward(self, *args, **kwargs)

    with patch.object(PretrainingModule, "forward", slow if groups.mesh.rank == 1 else forward):
        pretrain(prepare_run(config, groups.mesh))
    return "\n".join(said)


@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    config = replace(run_config(tmp_path), steps=4, guards=GuardConfig(times_every=2))
    said, _ = run_workers(2, slowly, config)
    slow = re.findall(r"step 4: rank (\d) on .* is slow: forward and backward take ", said)
    assert slow == ["1"], said  # a busy machine may tell more, of data or of the device
    events = b"".join(path.read_bytes() for path in Path(config.out, "tensorboard").rglob("events*"))
    assert b"times/forward_slowest_s" in events and b"times/slow_ranks" in events
