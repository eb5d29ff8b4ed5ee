"""launchers/pretrain.py on the GPU: killed and resumed; checkpoints that are written while the training goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from beit3_dist.checkpoint import read
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.checkpoint.shard import Shard
from beit3_dist.checkpoint.store import Store, TrainState
from beit3_dist.config import CheckpointConfig, ModelConfig, ParallelConfig
from tests.device import DEVICE, ON_GPU
from tests.integration.runs import (
    kill,
    metrics,
    reproducible,
    run_config,
    start,
    wait_for_checkpoint,
    wait_for_steps,
    write_recipe,
)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_a_killed_run_goes_on(deterministic: bool, tmp_path: Path) -> None:
    """In bf16 under ZeRO-3. Sums on a GPU come in any order: the same samples, and losses as near as bf16 is; where
    they are asked to be deterministic, the same bits."""
    config = run_config(
        tmp_path, steps=40, precision="bf16", deterministic=deterministic,
        parallel=ParallelConfig(zero_stage=3), checkpoint=CheckpointConfig(every=10),
    )  # fmt: skip
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    recipe = write_recipe(config, tmp_path / "recipe.yaml")
    command = ("launchers/pretrain.py", "--config", str(recipe), "--out")
    both = [start(*command, str(out)) for out in (disturbed, undisturbed)]  # at the same time: most of it is imports
    wait_for_steps(both[0], disturbed, 15)
    wait_for_checkpoint(both[0], disturbed)
    kill(both[0])
    assert len(metrics(disturbed)) < config.steps, "the run ended before it was killed"
    resumed = start(*command, str(disturbed), "--checkpoint.resume", "auto")
    for process in (both[1], resumed):
        output, _ = process.communicate(timeout=150)
        assert process.returncode == 0, output
    assert "going on after step" in output

    if deterministic:
        assert reproducible(disturbed) == reproducible(undisturbed)
    ours, theirs = metrics(disturbed), metrics(undisturbed)
    assert [record["step"] for record in ours] == list(range(1, config.steps + 1))
    assert [record["sample_hash"] for record in ours] == [record["sample_hash"] for record in theirs]
    losses = torch.tensor([[record["loss"] for record in run] for run in (ours, theirs)])
    assert (losses[0] - losses[1]).abs().max() <= 2e-2 * losses[1].max()
    last = [read_weights(out / "checkpoints" / "step_0000040") for out in (disturbed, undisturbed)]
    assert last[0].keys() == last[1].keys()
    first = read_weights(undisturbed / "checkpoints" / "step_0000020")
    distance, way = (
        sum((last[1][name] - other[name]).square().sum().item() for name in first) ** 0.5 for other in (last[0], first)
    )
    assert distance <= 0.2 * way, "the resumed run went elsewhere"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    backend, store = "nccl" if ON_GPU else "gloo", dist.FileStore(str(tmp_path / "group"), 1)
    if ON_GPU:
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_saving_beside_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the training writes into its weights after `save` is not in the checkpoint."""
    count = 300_000_001 if ON_GPU else 3_000_001  # more than one copy to the host takes
    names = ("", "/exp_avg", "/exp_avg_sq")
    values = torch.arange(count, dtype=torch.float32, device=DEVICE)
    held = [Shard("a.weight", torch.Size([count]), 0, {name: values + i for i, name in enumerate(names)})]
    device = torch.device(DEVICE.type, 0) if ON_GPU else DEVICE
    store = Store(tmp_path / "checkpoints", device, keep=0, keep_every=0, start=0)
    with caplog.at_level(logging.INFO):
        store.save(held, TrainState(step=7), ModelConfig(), "out: x\n", {"torch": "1"})
        for tensor in held[0].tensors.values():
            tensor.fill_(-1)
        store.wait()
    assert any("the training stood still for" in message for message in caplog.messages)
    empty = [Shard("a.weight", torch.Size([count]), 0, {n: torch.zeros(count) for n in names})]
    read.load(tmp_path / "checkpoints" / "step_0000007", empty)
    for number, name in enumerate(names):
        assert torch.equal(empty[0].tensors[name], values.cpu() + number), f"a.weight{name}"
