"""Gradients of norms that tensor ranks compute on their own tokens, where optimizers keep them on the host. Where they
stay on the device they are in the table of test_layouts.py, and their one message is counted in tests/scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from beit3_dist.config import RunConfig
from beit3_dist.parallel.mesh import Groups
from beit3_dist.train.optimizer import pretraining_optimizer
from tests.parallel import training
from tests.parallel.test_layouts import Layout, compare
from tests.parallel.training import SMALL_PIECES, assemble, engine_run
from tests.parallel.workers import run_workers


def offloaded(groups: Groups, configs: list[RunConfig]) -> list[dict[str, Any]]:
    """`engine_run` with torch's AdamW: DeepSpeed's own for the CPU would be compiled first."""
    training.pretraining_optimizer = lambda model, offload, config: pretraining_optimizer(model, False, config)
    return [engine_run(groups, config) for config in configs]


def test_states_on_the_host_change_nothing(tmp_path: Path) -> None:
    """Norms of gradients, by which these clip, and weights are those of one process."""
    layouts = [
        Layout(stage, "released", tensor=2, sequence=True, accumulation=2, clip_norm=0.5, steps=2) for stage in (2, 3)
    ]
    settings: dict[str, Any] = json.loads(SMALL_PIECES.read_text())
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings | {"zero_force_ds_cpu_optimizer": False}))
    configs = [replace(layout.config(), deepspeed_config=str(file)) for layout in layouts]
    ranks = run_workers(2, offloaded, configs, tensor=2)
    for layout, config, records in zip(layouts, configs, zip(*ranks, strict=True), strict=True):
        compare(assemble([*records], config), layout)
