"""neutral -> a running engine of any layout -> its checkpoint -> neutral: bit for bit, weights and moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from beit3_dist.checkpoint.neutral import write_neutral
from beit3_dist.checkpoint.store import Store, TrainState
from beit3_dist.config import RunConfig
from beit3_dist.model import BEiT3
from beit3_dist.model.initialization import initial_value
from beit3_dist.objectives.registry import objectives_of
from beit3_dist.objectives.together import PretrainingModule
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups
from beit3_dist.parallel.pipeline import plan_stages
from beit3_dist.run.checkpointing import contribution, load_checkpoint
from tests.parallel.training import MODELS, build, run_config
from tests.parallel.workers import run_workers
from tests.unit.test_neutral import write_checkpoint

STATE = TrainState(step=7, consumed={"images": 1, "texts": 2, "pairs": 3})


def load_and_save(groups: Groups, config: RunConfig, source: str, folder: str) -> None:
    """What a resumed run does between its start and its first step."""
    engine = Engine(
        config,
        groups,
        lambda: BEiT3(config.model, device="meta"),
        lambda name, shape: initial_value(name, shape, config.model, config.seed),
        plan=plan_stages(config, *objectives_of(config).largest(groups.mesh.data)),
        objective=lambda model: PretrainingModule(model, objectives_of(config), config.seed),
        optimizer=lambda model, offload: build(model, offload, config, False),
    )
    load_checkpoint(Path(source), engine, STATE)
    store = Store(Path(folder), groups.mesh.device, 0, 0, 0)
    store.save(contribution(engine), STATE, config.model, "out: x\n", {})
    store.wait()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_engines_of_any_layout_hold_the_same(model: str, tmp_path: Path) -> None:
    """One process with ZeRO-0, two with ZeRO-3 in bf16, tensor x pipeline ranks with ZeRO-1, one after the other."""
    values = BEiT3(MODELS[model], seed=5).state_dict()
    path = write_checkpoint(tmp_path / "source", 2, 2, values=values, model=MODELS[model])
    write_neutral(path, tmp_path / "expected")
    expected = (tmp_path / "expected" / "shard_00000.safetensors").read_bytes()
    path = tmp_path / "expected"
    for name, world, zero_stage, precision, tensor, pipeline in (
        ("one", 1, 0, "fp32", 1, 1),
        ("zero3", 2, 3, "bf16", 1, 1),
        ("mesh", 4, 1, "fp32", 2, 2),
    ):
        config = run_config(
            model, zero_stage=zero_stage, accumulation=2, data_parallel=world // (tensor * pipeline),
            precision=precision, tensor=tensor, pipeline=pipeline,
        )  # fmt: skip
        run_workers(world, load_and_save, config, str(path), str(tmp_path / name), tensor=tensor, pipeline=pipeline)
        path = tmp_path / name / "step_0000007"
        assert len(list(path.glob("shard_*"))) == world
        write_neutral(path, tmp_path / f"neutral-{name}")
        assert (tmp_path / f"neutral-{name}" / "shard_00000.safetensors").read_bytes() == expected, name
