"""launchers/pretrain.py with a fault: FAULT=KIND:RANK:STEP; KIND is raise or hang, STEP counts from 1."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

from beit3_dist.parallel.engine import Engine

kind, rank, step = os.environ["FAULT"].split(":")
train_step = Engine.train_step


def faulty_step(self: Engine, micro_batches: Any, counts: Any, number: int, lr: float) -> Any:
    if os.environ["RANK"] == rank and number + 1 == int(step):
        if kind == "raise":
            raise RuntimeError("the injected error")
        time.sleep(1000)
    return train_step(self, micro_batches, counts, number, lr)


Engine.train_step = faulty_step  # type: ignore[method-assign]
specification = importlib.util.spec_from_file_location("p", Path(__file__).parents[2] / "launchers" / "pretrain.py")
assert specification and specification.loader
launcher = importlib.util.module_from_spec(specification)
specification.loader.exec_module(launcher)
launcher.main(sys.argv[1:])
