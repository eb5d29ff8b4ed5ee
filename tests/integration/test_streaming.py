"""A run whose three streams come out of commands: killed and resumed, and in other layouts, it reads the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from beit3_dist.config import BatchConfig, CheckpointConfig, ParallelConfig, RunConfig
from tests.integration.runs import (
    kill,
    metrics,
    reproducible,
    run_config,
    start,
    train,
    wait_for_checkpoint,
    write_recipe,
)
from tests.launching import launch
from tests.parallel.workers import run_workers
from tests.unit.tar_fixtures import image_tar, pair_tar, sentences, text_tar

SHARDS = 3


def streamed(folder: Path) -> RunConfig:
    """Ten steps of two pictures, texts and pairs from each of two virtual readers over three shards."""
    config = run_config(folder)
    for number in range(SHARDS):
        image_tar(folder / f"i-{number}.tar", 5 + number, seed=10 * number)
        pair_tar(folder / f"p-{number}.tar", 5 + number, seed=10 * number)
        text_tar(folder / f"t-{number}.tar", sentences()[6 * number : 6 * number + 6])
    shards = {kind: f"pipe:cat {folder}/{kind[0]}-{{0..{SHARDS - 1}}}.tar" for kind in ("images", "texts", "pairs")}
    data = replace(config.data, **shards, virtual_readers=2, workers=2)
    batch = BatchConfig(images=4, texts=4, pairs=4, accumulation=2)
    return replace(config, data=data, steps=10, batch=batch, checkpoint=CheckpointConfig(every=3))


@pytest.mark.slow
def test_killed_resumed_and_in_other_layouts(tmp_path: Path) -> None:
    config = streamed(tmp_path)
    undisturbed, disturbed = str(tmp_path / "undisturbed"), str(tmp_path / "disturbed")
    recipe = write_recipe(config, tmp_path / "recipe.yaml")
    whole = launch("pretrain", "--config", str(recipe), "--out", undisturbed)
    assert whole.returncode == 0, whole.stderr

    process = start("launchers/pretrain.py", "--config", str(recipe), "--out", disturbed)
    wait_for_checkpoint(process, disturbed)
    kill(process)
    assert len(Path(disturbed, "metrics.jsonl").read_bytes().splitlines()) < config.steps, (
        "the run ended before it was killed"
    )
    # Another number of loader processes: their parts are put together in the same order, so that no bit differs.
    options = "--out", disturbed, "--checkpoint.resume", "auto", "--data.workers", "0"
    again = launch("pretrain", "--config", str(recipe), *options)
    assert again.returncode == 0 and "going on after step" in again.stderr, again.stderr
    assert [record["step"] for record in metrics(disturbed)] == list(range(1, config.steps + 1))
    assert reproducible(disturbed) == reproducible(undisturbed)
    first, last = (
        json.loads(Path(undisturbed, "checkpoints", f"step_{step:07d}", "state.json").read_text())["readers"]
        for step in (6, 10)
    )
    assert len(first) == len(last) == 6 and first != last, "three streams of two readers that go on"

    for world, parallel in ((2, ParallelConfig(zero_stage=2)), (2, ParallelConfig(zero_stage=1, tensor=2)),
                            (2, ParallelConfig(zero_stage=1, pipeline=2))):  # fmt: skip
        other = replace(
            config,
            data=replace(config.data, workers=0),  # the test's processes may have no children
            out=str(tmp_path / f"tp{parallel.tensor}-pp{parallel.pipeline}"),
            parallel=parallel,
            checkpoint=CheckpointConfig(every=4, resume=str(Path(undisturbed, "checkpoints", "step_0000006"))),
        )
        assert set(run_workers(world, train, other, tensor=parallel.tensor, pipeline=parallel.pipeline)) == {""}
        expected = metrics(undisturbed)[6:]
        assert [r["sample_hash"] for r in metrics(other.out)] == [r["sample_hash"] for r in expected]
        assert [r["loss"] for r in metrics(other.out)] == pytest.approx([r["loss"] for r in expected], rel=1e-5)
        state = json.loads(Path(other.out, "checkpoints", "step_0000010", "state.json").read_text())
        assert state["readers"] == last, "where the readers stand does not depend on the layout"


def test_what_needs_random_access_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(streamed(tmp_path), tmp_path / "recipe.yaml")
    cases = [
        (("--eval.every", "2", "--eval.images", "pipe:cat x", "--eval.texts", "x", "--eval.pairs", "x"), "eval.images"),
        (("--data.virtual_readers", "3"), "data.virtual_readers=3"),
    ]
    for overrides, named in cases:
        refused = launch("pretrain", "--config", str(recipe), *overrides)
        [line] = [line for line in refused.stderr.splitlines() if "error" in line]
        assert refused.returncode == 2 and named in line, refused.stderr
