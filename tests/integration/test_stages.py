"""Three stages as VLMo's: images, then texts with attention and vision frozen, then pairs; killed in the third."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from beit3_dist.checkpoint.read import read_weights
from beit3_dist.command_line import to_yaml
from beit3_dist.config import BatchConfig, CheckpointConfig, OptimConfig, ParallelConfig, RunConfig
from beit3_dist.parallel.engine import Engine
from beit3_dist.parallel.mesh import Groups, read_mesh
from beit3_dist.run.stage_file import Stage
from beit3_dist.run.stages import ReadyStages, prepare_stages
from beit3_dist.train.stages import train_stages
from launchers import stages as launcher
from tests.integration.runs import kill, metrics, reproducible, run_config, start, wait_for_checkpoint
from tests.launching import launch
from tests.parallel.workers import Workers

FROZEN = ["!*.attention*", "!*.vision*", "!vision_embedding.*", "!image_head.*"]
STEPS = {"images": 2, "texts": 2, "pairs": 60}


def stage_configs(folder: Path, **changes: dict[str, Any]) -> dict[str, RunConfig]:
    """The stages' recipes; `changes` of each."""
    plain = run_config(folder, parallel=ParallelConfig(zero_stage=1), checkpoint=CheckpointConfig(every=2))
    single = replace(plain.model, vl_expert_layers=0)
    own: dict[str, dict[str, Any]] = {
        "images": {"batch": BatchConfig(images=4, texts=0, pairs=0), "model": single},
        "texts": {"batch": BatchConfig(images=0, texts=4, pairs=0), "model": single, "train_only": FROZEN},
        "pairs": {"batch": BatchConfig(images=0, texts=0, pairs=4)},
    }
    optim = OptimConfig(lr=1e-3, warmup_steps=1)
    return {
        name: replace(plain, **{"steps": STEPS[name], "optim": optim} | own[name] | changes.get(name, {}))
        for name in STEPS
    }


def stage_file(folder: Path, **changes: dict[str, Any]) -> Path:
    for name, config in stage_configs(folder, **changes).items():
        fields = yaml.safe_load(to_yaml(config))
        del fields["out"], fields["init_from"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(fields))
    file = folder / "stages.yaml"
    file.write_text(yaml.safe_dump({"stages": {name: f"{name}.yaml" for name in STEPS}}, sort_keys=False))
    return file


def mesh_of(config: RunConfig) -> Any:
    return read_mesh(config.parallel.tensor, config.parallel.pipeline)


def in_turn(groups: Groups, configs: dict[str, RunConfig]) -> list[bool]:
    """For `Workers.run`: all stages; whether the engines of each were gone before the next one."""
    engines: list[weakref.ref[Engine]] = []
    gone: list[bool] = []
    made = Engine.__init__

    def counted(self: Engine, *arguments: Any, **named: Any) -> None:
        gone.append(all(engine() is None for engine in engines))
        engines.append(weakref.ref(self))
        made(self, *arguments, **named)

    Engine.__init__ = counted  # type: ignore[method-assign]
    try:
        train_stages("stages.py", prepare_stages([Stage(n, c) for n, c in configs.items()], mesh_of))
    finally:
        Engine.__init__ = made  # type: ignore[method-assign]
    return gone


def chained(configs: dict[str, RunConfig], out: Path) -> dict[str, RunConfig]:
    """As the launcher chains them."""
    chain, before = {}, ""
    for name, config in configs.items():
        chain[name] = replace(config, out=str(out / name), init_from=before)
        before = chain[name].out
    return chain


def last(out: Path, name: str) -> dict[str, torch.Tensor]:
    return read_weights(out / name / "checkpoints" / f"step_{STEPS[name]:07d}")


@pytest.mark.slow
def test_killed_in_the_third_stage_it_goes_on_there(tmp_path: Path) -> None:
    file, whole, killed = stage_file(tmp_path), tmp_path / "whole", tmp_path / "killed"
    with Workers(1) as workers:
        (gone,) = workers.run(in_turn, chained(stage_configs(tmp_path), whole))
    assert gone == [True] * 3

    options = ["--config", str(file), "--out", str(killed)]
    process = start("launchers/stages.py", *options)
    wait_for_checkpoint(process, killed / "pairs")
    kill(process)
    assert len(metrics(killed / "pairs")) < STEPS["pairs"], "it ended before it was killed"
    records = [(killed / name / "metrics.jsonl").stat() for name in ("images", "texts")]
    again = launch("stages", *options, "--checkpoint.resume", "auto")
    assert again.returncode == 0, again.stderr
    assert "stage images is done" in again.stderr and "stage texts is done" in again.stderr
    assert records == [(killed / name / "metrics.jsonl").stat() for name in ("images", "texts")]
    assert "going on after step" in again.stderr
    for name in STEPS:
        assert reproducible(killed / name) == reproducible(whole / name)
        ours, theirs = last(killed, name), last(whole, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    done = launch("stages", *options, "--checkpoint.resume", "auto", "--dry-run")
    assert done.returncode == 0 and "nothing is wrong; to do: nothing" in done.stdout, done.stderr

    images, texts, pairs = (last(whole, name) for name in STEPS)
    same = {name for name, value in texts.items() if torch.equal(value, images[name])}
    assert "blocks.1.attention.q.shared.weight" in same and "blocks.0.ffn.vision.fc1.weight" in same
    assert "language_embedding.words.weight" not in same and "blocks.0.ffn.language.fc1.weight" not in same
    assert any(".ffn.vl." in name for name in pairs) and not any(".ffn.vl." in name for name in texts)


@pytest.mark.slow
def test_a_stage_may_have_another_layout(tmp_path: Path) -> None:
    layouts = {"texts": ParallelConfig(tensor=2, zero_stage=3), "pairs": ParallelConfig(pipeline=2, zero_stage=1)}
    batch = BatchConfig(images=0, texts=0, pairs=4, accumulation=2)
    changes = {name: {"parallel": layout, "steps": 2} for name, layout in layouts.items()}
    configs = stage_configs(tmp_path, **changes | {"pairs": {**changes["pairs"], "batch": batch}})
    alone = {name: replace(config, parallel=ParallelConfig(zero_stage=1)) for name, config in configs.items()}
    for world, some, out in ((2, configs, "spread"), (1, alone, "alone")):
        with Workers(world) as workers:
            workers.run(in_turn, chained(some, tmp_path / out))
    for name in STEPS:
        for ours, theirs in zip(metrics(tmp_path / "spread" / name), metrics(tmp_path / "alone" / name), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_mistakes_of_the_third_stage_are_found_before_the_first(tmp_path: Path, capsys: Any) -> None:
    def prepared(**changes: dict[str, Any]) -> ReadyStages:
        configs = chained(stage_configs(tmp_path, **changes), tmp_path / "out")
        return prepare_stages([Stage(name, config) for name, config in configs.items()], mesh_of)

    model = stage_configs(tmp_path)["pairs"].model
    ready = prepared(pairs={"model": replace(model, image_size=64)})  # positions would be interpolated
    assert [stage.name for stage in ready.stages] == list(STEPS) and ready.first is not None
    for mistake, told in {
        "model": (replace(model, width=48), "stage pairs: init_from: .*texts: .* has shape"),
        "model ": (replace(model, heads=4), "stage pairs: init_from: .*texts has model.heads=2, this run has 4"),
        "train_only": (["blocks.7.*"], "stage pairs: train_only: 'blocks.7.*' matches no parameter"),
        "image_tokenizer": ("nothing.pth", "stage pairs: .*nothing.pth"),
    }.items():
        with pytest.raises(ValueError, match=told[1]):
            prepared(pairs={mistake.strip(): told[0]})
    assert not (tmp_path / "out").exists()

    with pytest.raises(SystemExit) as ended:
        launcher.main(["--config", str(stage_file(tmp_path)), "--out", str(tmp_path), "--pairs.stepps", "3"])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("stages.py: stage pairs: error: ")
