"""An objective from outside the package is one file: it is learnt in any layout, validated, reported and resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from beit3_dist.checkpoint.model_folder import read_model_folder
from beit3_dist.checkpoint.read import read_weights
from beit3_dist.command_line import parse
from beit3_dist.config import BatchConfig, CheckpointConfig, ParallelConfig, RunConfig
from beit3_dist.objectives import SECTIONS
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.objectives.registry import OBJECTIVES, objectives_of, register
from beit3_dist.parallel.mesh import Mesh
from beit3_dist.plugins import load_plugins
from beit3_dist.run.preflight import prepare_run
from tests.integration.runs import (
    evaluations,
    metrics,
    named,
    reproducible,
    run_config,
    same_losses,
    second_half,
    train_in_turn,
    validated,
    write_recipe,
)
from tests.launching import launch
from tests.parallel.workers import Workers
from tools import convert_checkpoint

PLUGIN, OTHER = (str(Path(__file__).parents[1] / "plugins" / f"{name}_colour.py") for name in ("mean", "whole"))
"""The other one wants pairs alone that masked data modelling wants fused, and nothing of them hidden."""
STEPS = 6
ALONE = Mesh(0, 1, 0, 1, torch.device("cpu"))
LAYOUTS = {
    "one": ParallelConfig(zero_stage=1),
    "dp2": ParallelConfig(zero_stage=3),
    "tp2": ParallelConfig(zero_stage=1, tensor=2),
    "pp2": ParallelConfig(zero_stage=1, pipeline=2),
}
FIELD = "loss_mean_colour"
HEAD = "objective_heads.mean_colour"


def with_mean_colour(folder: Path, out: str, **changes: Any) -> RunConfig:
    """A run that learns colours beside masked data modelling, and is validated twice."""
    load_plugins([PLUGIN, OTHER])
    config = run_config(folder)
    objectives = {NAME: MaskedDataModelingConfig(), "mean_colour": OBJECTIVES["mean_colour"].Config(weight=0.5)}
    objectives["whole_colour"] = OBJECTIVES["whole_colour"].Config()
    settings: dict[str, Any] = {
        "out": str(folder / out), "steps": STEPS, "plugins": [PLUGIN, OTHER], "objectives": objectives,
        "parallel": LAYOUTS["one"], "checkpoint": CheckpointConfig(every=3),
        "eval": validated(config, every=3),
    }  # fmt: skip
    return replace(config, **settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all layouts; those of one process and of two replicas are resumed in their middle, too."""
    folder = tmp_path_factory.mktemp("plugin")
    for layout, parallel in LAYOUTS.items():
        config = with_mean_colour(folder, layout, parallel=parallel)
        with Workers(1 if layout == "one" else 2, parallel.tensor, parallel.pipeline) as workers:
            workers.run(train_in_turn, [config] if layout in ("tp2", "pp2") else [config, second_half(config)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_losses_are_those_of_one_process(folder: Path, layout: str) -> None:
    for record, _ in same_losses(folder / layout, folder / "one", STEPS, {FIELD: 0.5}):
        assert named(record, "loss") > {FIELD, "loss_image", "loss_colour_of_image", "loss_colour_of_caption"}
        assert not any(name.startswith("acc") and "colour" in name for name in record)


@pytest.mark.slow
def test_it_is_learnt_and_recorded(folder: Path) -> None:
    events = EventAccumulator(str(folder / "one" / "tensorboard"))
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if "mean_colour" in tag}
    written = {float(torch.tensor(record[FIELD])) for record in metrics(folder / "one") + evaluations(folder / "one")}
    assert {event.value for some in scalars.values() for event in some} == written and len(scalars) == 2
    weights = [read_weights(folder / "one" / "checkpoints" / f"step_{step:07d}") for step in (3, 6)]
    assert weights[0][f"{HEAD}.weight"].shape == (3, 32)
    assert not torch.equal(weights[0][f"{HEAD}.bias"], weights[1][f"{HEAD}.bias"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "dp2"])
def test_resumed_bit_for_bit(folder: Path, layout: str) -> None:
    assert reproducible(folder / f"{layout}-resumed") == reproducible(folder / layout)[3:]
    last = Path("checkpoints", f"step_{STEPS:07d}")
    undisturbed, found = read_weights(folder / layout / last), read_weights(folder / f"{layout}-resumed" / last)
    assert undisturbed.keys() == found.keys() >= {f"{HEAD}.weight", f"{HEAD}.bias"}
    assert all(torch.equal(value, found[name]) for name, value in undisturbed.items())


@pytest.mark.slow
def test_others_take_its_run(folder: Path, tmp_path: Path) -> None:
    """A run that has the objective starts from its head, one that lacks it from all else; so do other formats."""
    checkpoint = str(folder / "one" / "checkpoints" / f"step_{STEPS:07d}")
    saved = read_weights(Path(checkpoint))
    with_it = with_mean_colour(folder, "new", init_from=checkpoint)
    without = replace(with_it, objectives={NAME: MaskedDataModelingConfig()})
    for config, objectives in ((with_it, 1), (without, 0)):
        values, model = prepare_run(config, ALONE).values, objectives_of(config).build()
        found = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert sum(name.startswith("objective_heads") for name in found) == 6 * objectives
        assert all(torch.equal(values(name, shape), saved[name]) for name, shape in found.items())
    convert_checkpoint.main([checkpoint, str(tmp_path / "model"), "--to", "safetensors"])
    assert set(read_model_folder(tmp_path / "model").weights) == set(saved)
    convert_checkpoint.main(
        [str(tmp_path / "model"), str(tmp_path / "encoder"), "--to", "safetensors", "--heads", "drop"]
    )
    assert not any("head" in name for name in read_model_folder(tmp_path / "encoder").weights)
    convert_checkpoint.main([str(tmp_path / "model"), str(tmp_path / "vision.pth"), "--to", "timm"])


@pytest.mark.slow
def test_tools_import_what_their_own_command_line_names(folder: Path, tmp_path: Path) -> None:
    """A run's folder may be somebody else's, whose plugins are programs."""
    run = shutil.copytree(folder / "one", tmp_path / "run")
    for tool in ("tools.report", "tools.verify_order"):
        refused = launch(tool, str(run))
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
        assert "objectives.mean_colour: there is no mean_colour" in refused.stderr and "plugins" in refused.stderr
        done = launch(tool, str(run), "--plugins", PLUGIN, OTHER)
        assert done.returncode == 0, done.stderr
    report = json.loads((run / "report.json").read_text())
    records = metrics(run)
    assert report["losses"]["mean_colour"] == {
        "first": records[0][FIELD],
        "last": pytest.approx(sum(record[FIELD] for record in records) / STEPS),
        "held_out": evaluations(run)[-1][FIELD],
    }
    assert "mean_colour" not in report["accuracies"] | report["entropies"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["recipe", "command line"])
def test_from_the_command_line_with_loader_processes(folder: Path, tmp_path: Path, where: str) -> None:
    config = with_mean_colour(folder, "one", plugins=[PLUGIN, OTHER] if where == "recipe" else [])
    recipe = write_recipe(config, tmp_path / "recipe.yaml")
    given = [] if where == "recipe" else [f"--plugins=[{PLUGIN},{OTHER}]"]
    out = tmp_path / "run"
    done = launch("pretrain", "--config", str(recipe), "--out", str(out), "--data.workers", "1", *given)
    assert done.returncode == 0, done.stderr
    assert reproducible(out) == reproducible(folder / "one")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "plugins: {} cannot be imported: FileNotFoundError: there is no file"),
        ("import nothing_of_this_name", "plugins: {} cannot be imported: ModuleNotFoundError"),
        ("x = (", "plugins: {} cannot be imported: SyntaxError"),
    ],
    ids=["missing", "broken", "no Python"],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(code: str | None, words: str, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    plugin, recipe = tmp_path / "a_plugin.py", tmp_path / "recipe.yaml"
    if code:
        plugin.write_text(code)
    recipe.write_text(f"plugins: [{plugin}]\n")
    for given in (["--config", str(recipe)], ["--plugins", str(plugin)], [f"--plugins=[{plugin}]"]):
        with pytest.raises(SystemExit) as ended:
            parse(RunConfig, "pretrain.py", "", given, SECTIONS)
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and words.format(plugin) in line


def test_what_it_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_mean_colour(tmp_path, "run")
    alone = replace(config, objectives={"mean_colour": config.objectives["mean_colour"]})
    with pytest.raises(ValueError, match="what masked_data_modeling hides: .* objectives.masked_data_modeling"):
        objectives_of(alone)
    texts = replace(config, batch=BatchConfig(images=0, texts=4, pairs=0))
    with pytest.raises(ValueError, match="objectives.mean_colour reads none of the streams that batch has"):
        objectives_of(texts)
    monkeypatch.setattr(OBJECTIVES["mean_colour"], "second_pass", True)
    two_stages = Mesh(0, 2, 0, 2, torch.device("cpu"), pipeline=2)
    with pytest.raises(ValueError, match="parallel.pipeline=2: the objective mean_colour takes a second pass"):
        prepare_run(replace(config, parallel=LAYOUTS["pp2"]), two_stages)
    with pytest.raises(ValueError, match="there are two objectives named mean_colour"):
        register(OBJECTIVES["mean_colour"])
