"""Copies of weights stay equal bit for bit over steps of any layout, and one flipped bit is found and named."""

from __future__ import annotations

import socket
from itertools import starmap
from pathlib import Path

import pytest
import torch

from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import initial_value
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.endings import RunStopped
from beit3_dist.run.guards.copies import EqualCopies, Held, digest
from beit3_dist.train.totals import host_totals
from tests.micro_batches import precomputed_codes
from tests.parallel.training import build, micro_batches, run_config
from tests.parallel.workers import run_workers

FLIPPED = "blocks.0.attention_norm.shared.weight"


def flipped(groups: Groups, configs: list[RunConfig], out: str) -> list[str]:
    """After two steps of each run nothing differs; what is told of a bit that the last rank flips."""
    told = []
    for config in configs:
        mesh, objectives = groups.mesh, objectives_of(config)
        engine = Engine(
            config, groups, lambda config=config: BEiT3(config.model, device="meta"),
            lambda name, shape, config=config: initial_value(name, shape, config.model, config.seed),
            objective=lambda model, config=config: PretrainingModule(model, objectives_of(config), config.seed),
            optimizer=lambda model, offload, config=config: build(model, offload, config, sgd=False),
        )  # fmt: skip
        state, copies = TrainState(), EqualCopies(1, groups, Path(out), 0)
        for step in range(2):
            mine = micro_batches(config.model, step, mesh.data, range(mesh.data_rank, mesh.data))[:1]
            counts = torch.tensor(host_totals(mine, objectives).counts)
            groups.sum_over_data(counts)
            prepared = (objectives.prepare(b, mesh.device, precomputed_codes(config.model)) for b in mine)
            engine.train_step(prepared, counts, step, 1e-3)
            state.step = step + 1
            copies.check(state, starmap(Held, engine.weights()))
        (values,) = (values for name, values, _, _ in engine.weights() if name == FLIPPED)
        if mesh.rank == mesh.world - 1:
            values.data.view(-1).view(torch.int32)[1] ^= 1 << 3
        with pytest.raises(RunStopped) as stopped:
            copies.check(state, starmap(Held, engine.weights()))
        told.append(str(stopped.value))
    return told


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor", "stages"), [(4, 1, (0, 1)), (1, 2, (1, 3))])
def test_one_flipped_bit_is_found_and_named(data: int, tensor: int, stages: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_0000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_0000003").mkdir()
    configs = [
        run_config("paper", zero_stage=stage, accumulation=1, data_parallel=data, tensor=tensor) for stage in stages
    ]
    of_rank = run_workers(data * tensor, flipped, configs, str(tmp_path), tensor=tensor)
    host = socket.gethostname()
    where = f"{FLIPPED} on rank 3 on {host}" if data == 4 else f"{FLIPPED} on rank 0 on {host} or rank 1 on {host}"
    for told in (line for lines in of_rank for line in lines):
        assert f"after step 2 copies of weights are no longer equal: {where}. " in told
        assert told.endswith(f"after step 2: go on from {tmp_path}/checkpoints/step_0000002 by --checkpoint.resume")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_flipped_bit_changes_the_digest(dtype: torch.dtype) -> None:
    values = torch.randn(9, 5).to(dtype)
    before, size = digest(values), values.element_size()
    bits = values.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    for bit in range(8 * size):
        bits[17] ^= torch.tensor(1, dtype=bits.dtype) << bit
        assert digest(values) != before
        bits[17] ^= torch.tensor(1, dtype=bits.dtype) << bit
    assert digest(values) == before == digest(values.T.contiguous().T)
