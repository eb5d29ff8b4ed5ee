"""What the tests of ZeRO stages share."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.parallel.test_layouts import Layout, reference
from tests.parallel.training import assemble, engine_run
from tests.parallel.workers import KeptWorkers


def losses_near_fp32(layout: Layout, workers: KeptWorkers, cuda_graphs: bool = False) -> None:
    """Raises AssertionError where losses in bf16 are not those of a plain run in fp32 to bf16's three digits."""
    config = replace(layout.config("bf16"), cuda_graphs=cuda_graphs)
    multiple = 32 if cuda_graphs else None
    run = assemble(workers.of(1, 1, 1).run(engine_run, config, False, None, multiple), config)
    plain = reference(layout.model, layout.layers, layout.accumulation, layout.clip_norm, layout.sgd, layout.steps)
    fp32 = torch.tensor(plain.losses)
    assert 0 < (torch.tensor(run.losses) - fp32).norm() <= 4e-3 * fp32.norm()
