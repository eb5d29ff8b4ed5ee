"""A run that is killed goes on as if nothing had happened."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_dist.checkpoint import snapshot
from beit3_dist.checkpoint.find import find, read_manifest
from beit3_dist.checkpoint.read import OBJECTIVE_STATE, TEACHER, StoredShards
from beit3_dist.checkpoint.store import TrainState
from beit3_dist.config import CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.objectives.masked_data_modeling import MaskedDataModelingConfig
from beit3_dist.objectives.momentum_distillation import MomentumDistillationConfig
from beit3_dist.parallel.mesh import Groups
from beit3_dist.run.endings import RunStopped
from beit3_dist.run.guards import Guards
from tests.integration.runs import (
    evaluations,
    kill,
    metrics,
    reproducible,
    run_config,
    start,
    train,
    wait_for_checkpoint,
    wait_for_steps,
    write_recipe,
)
from tests.launching import launch
from tests.parallel.test_zero_shot import config_of as zero_shot_config
from tests.parallel.workers import free_port, run_workers


def started(recipe: Path, *overrides: str) -> subprocess.Popen:
    """The README's command, with two processes."""
    return start("-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators", "2", "--master_port",
                 str(free_port()), "launchers/pretrain.py", "--config", str(recipe), *overrides)  # fmt: skip


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_undisturbed_run(tmp_path: Path) -> None:
    """Under the deepspeed launcher, ZeRO-3 on two ranks: SIGKILL to all processes between two checkpoints. So are its
    validations, of which there is one behind the checkpoint and before the kill, whatever they score, and the queue and
    the moving average that teach."""
    config, scored = run_config(tmp_path), zero_shot_config(tmp_path, "scored")
    evaluated = replace(scored.eval, every=5, captions=scored.eval.retrieval)
    objectives: dict[str, Any] = {"masked_data_modeling": MaskedDataModelingConfig(), **scored.objectives,
                  "momentum_distillation": MomentumDistillationConfig(decay=0.5, queue=10)}  # fmt: skip
    config = replace(config, objectives=objectives, eval=evaluated)
    undisturbed, disturbed = str(tmp_path / "undisturbed"), str(tmp_path / "disturbed")
    recipe = write_recipe(config, tmp_path / "recipe.yaml")

    process = started(recipe, "--out", undisturbed)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "samples/s" in output and "left" in output, "no progress line"

    process = started(recipe, "--out", disturbed)
    log = Path(disturbed, "metrics.jsonl")
    wait_for_steps(process, disturbed, 6)
    wait_for_checkpoint(process, disturbed)
    kill(process)
    done = len(log.read_bytes().splitlines())
    assert done < config.steps, "the run ended before it was killed"
    with open(log, "a") as file:
        file.write('{"step": 9')  # what a crash of the machine can leave behind

    process = started(recipe, "--out", disturbed, "--checkpoint.resume", "auto")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "going on after step" in output

    assert [record["step"] for record in metrics(disturbed)] == list(range(1, config.steps + 1))
    assert reproducible(disturbed) == reproducible(undisturbed)  # JSON keeps every bit of a float
    assert evaluations(disturbed) == evaluations(undisturbed) and len(evaluations(disturbed)) == 2
    assert {*evaluations(disturbed)[0]} > {"exact_match", "acc1", "lp_acc1", "knn10_acc1", "image_retrieval_recall@1"}
    ours, reference = (StoredShards(Path(out, "checkpoints", "step_0000012")) for out in (disturbed, undisturbed))
    assert f"{OBJECTIVE_STATE}contrastive.queue" in ours.names and TEACHER in ours.suffixes("text_head.weight")
    for name in reference.names:
        for suffix in reference.suffixes(name):
            assert torch.equal(ours.whole(name, suffix), reference.whole(name, suffix)), name + suffix
    assert list(Path(disturbed).glob("metrics.tail-*.jsonl")), "the tail of the killed run is kept aside"


LAYOUTS = {  # name -> processes, layout, kernels
    "dp2-zero1": (2, ParallelConfig(zero_stage=1), "torch"),
    "dp2-zero3": (2, ParallelConfig(zero_stage=3), "torch"),
    "dp2-zero3-compiled": (2, ParallelConfig(zero_stage=3), "compiled"),
    "dp2tp2pp2-zero1": (8, ParallelConfig(zero_stage=1, tensor=2, pipeline=2, sequence=True), "torch"),
    "dp2tp2pp2-zero3": (8, ParallelConfig(zero_stage=3, tensor=2, pipeline=2), "torch"),
}


def shard_digests(checkpoint: Path) -> dict[str, str]:
    """Digest of every rank's weights and moments."""
    return {name: digest for name, (_, digest) in read_manifest(checkpoint).items() if name.startswith("shard_")}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_at_half_time_is_bitwise_the_uninterrupted_run(layout: str, tmp_path: Path) -> None:
    """Losses, gradient norms, sample hashes as they were written, every bit of them; all weights and moments."""
    world, parallel, kernels = LAYOUTS[layout]
    whole = run_config(tmp_path, out=str(tmp_path / "whole"), steps=6, parallel=parallel, kernels=kernels,
                       checkpoint=CheckpointConfig(every=3, keep=0))  # fmt: skip
    mesh = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    assert set(run_workers(world, train, whole, **mesh)) == {""}
    half = Path(whole.out, "checkpoints", "step_0000003")
    second = replace(whole, out=str(tmp_path / "second"), checkpoint=CheckpointConfig(every=3, resume=str(half)))
    assert set(run_workers(world, train, second, **mesh)) == {""}

    assert [record["step"] for record in metrics(second.out)] == [4, 5, 6]
    for ours, expected in zip(reproducible(second.out), reproducible(whole.out)[3:], strict=True):
        for name in ("loss", "loss_image", "loss_text", "loss_pair_image", "loss_pair_text", "grad_norm"):
            assert ours[name].hex() == expected[name].hex(), f"{name} of step {ours['step']}"
        assert ours == expected
    ours, expected = (shard_digests(Path(run.out, "checkpoints", "step_0000006")) for run in (second, whole))
    assert len(ours) == world and ours == expected
    assert ours != shard_digests(half)


def stop_itself(groups: Groups, config: RunConfig) -> str:
    """`train`, which ends itself as soon as it has begun to save, while a slow disk writes."""
    write = snapshot.write_hashed

    def slowly(path: Path, parts: Any) -> dict[str, Any]:
        time.sleep(0.3)
        return write(path, parts)

    def check(guards: Guards, state: TrainState) -> None:
        if state.step == 2:
            raise RunStopped("enough")

    snapshot.write_hashed, Guards.check_samples = slowly, check  # type: ignore[method-assign]
    return train(groups, config)


def test_a_run_that_stops_itself_keeps_what_it_was_saving(tmp_path: Path) -> None:
    config = run_config(tmp_path, checkpoint=CheckpointConfig(every=2))
    assert run_workers(2, stop_itself, config) == ["enough", "enough"]
    assert find("auto", Path(config.out, "checkpoints")) == Path(config.out, "checkpoints", "step_0000002")


@pytest.mark.slow
def test_a_flipped_byte_on_the_command_line(tmp_path: Path) -> None:
    """By path: one line that names the file, exit code 2. With auto: it goes on from the one before."""
    config = run_config(tmp_path, steps=6, checkpoint=CheckpointConfig(every=2, keep=0))
    assert run_workers(2, train, config) == ["", ""]
    before, damaged = (Path(config.out, "checkpoints", f"step_{step:07d}") for step in (4, 6))
    shard = damaged / "shard_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    recipe = write_recipe(replace(config, steps=8), tmp_path / "recipe.yaml")
    refused = launch(
        "pretrain", "--config", str(recipe), "--checkpoint.resume", str(damaged), "--out", str(tmp_path / "other")
    )
    assert refused.returncode == 2, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if "error" in line]
    assert line.startswith(f"pretrain.py: error: checkpoint.resume: {shard}: the SHA-256") and "Trace" not in line
    went_on = launch("pretrain", "--config", str(recipe), "--checkpoint.resume", "auto")
    assert went_on.returncode == 0, went_on.stderr
    assert f"{shard}: the SHA-256" in went_on.stderr and f"going on after step 4 from {before}" in went_on.stderr
    assert [record["step"] for record in metrics(config.out)] == list(range(1, 9))
