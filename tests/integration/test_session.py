"""Runs from Python: in this process, with callbacks, one after the other, and what is left of them there."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import beit3_dist
from beit3_dist import Model, RunConfig, pretrain, read_config
from beit3_dist.config import CallbackConfig, CheckpointConfig
from beit3_dist.parallel.mesh import Groups
from tests.integration.runs import metrics, run_config, validated, write_recipe
from tests.parallel.workers import run_workers

NOTES = """
import json
from pathlib import Path

def note(what):
    line = str(what) if isinstance(what, Path) else json.dumps(what)
    with open(Path(__file__).parent / "notes.txt", "a") as file:
        file.write(line + "\\n")
"""


def test_public_names_cost_no_torch() -> None:
    program = "import sys, beit3_dist; from beit3_dist import RunConfig, read_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    assert {"pretrain", "read_config", "RunConfig", "Model"} <= set(dir(beit3_dist)) and Model.load
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        beit3_dist.nothing  # noqa: B018


def test_a_recipe_with_changed_fields(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"out": str(tmp_path), "steps": 50, "data": {"pairs": [{"shards": "a.tar", "weight": 2}]}}
    fields |= {"batch": {"images": 0}, "objectives": {"contrastive": {"form": "sigmoid"}}}
    config = read_config("demo_contrast", **fields)
    assert isinstance(config, RunConfig) and (config.steps, config.batch.images, config.batch.pairs) == (50, 0, 56)
    assert config.objectives["contrastive"].form == "sigmoid" and config.data.pairs[0].weight == 2
    with pytest.raises(ValueError, match="model.width=128 is not divisible by model.heads=7"):
        read_config("demo", model={"heads": 7})
    config = read_config("demo", out=tmp_path, steps=np.int64(70), plugins=[], data={"pairs": [tmp_path / "a.tar"]})
    assert (config.steps, config.data.pairs) == (70, [f"{tmp_path}/a.tar"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": {1}}, r"^steps=\{1\}: a recipe holds no set; give a number"),
        ({"callbacks": {"on_step": print}}, "^callbacks.on_step=<built-in.* holds no builtin"),
        ({"steps": "many"}, 'steps": Expected a'),
        ({"nothing": 1}, "nothing"),
    ],
)
def test_a_mistake_is_a_value_error_of_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as mistake:
        read_config("demo", **fields)
    assert "\n" not in str(mistake.value)


def in_one_process(groups: Groups, folder: str) -> None:
    """The session's test, in a process that a run may spoil."""
    path = Path(folder)
    (path / "notes.py").write_text(NOTES)
    config = run_config(path, steps=4, checkpoint=CheckpointConfig(every=2))
    named = CallbackConfig(**{name: f"{path}/notes.py:note" for name in ("on_step", "on_validation", "on_save")})
    config = replace(config, eval=validated(config, 4), callbacks=named)
    handlers = signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers)
    steps: list[dict[str, Any]] = []
    saved: list[Path] = []
    assert pretrain(config, on_step=steps.append, on_save=saved.append) == Path(config.out)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step.items() <= line.items() for step, line in zip(steps, metrics(config.out), strict=True))
    assert saved == [Path(config.out, "checkpoints", f"step_000000{step}") for step in (2, 4)]
    notes = (path / "notes.txt").read_text().splitlines()
    assert [json.loads(line)["step"] for line in notes if line.startswith("{")] == [1, 2, 3, 4, 4]
    assert [line for line in notes if not line.startswith("{")] == list(map(str, saved))

    def refuse(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    again = replace(config, out=f"{config.out}-again", callbacks=CallbackConfig())
    with pytest.raises(KeyboardInterrupt):
        pretrain(again, on_step=lambda record: None if record["step"] < 3 else refuse(record))
    pretrain(replace(again, checkpoint=replace(again.checkpoint, resume="auto")))
    whole = [[line["loss"] for line in metrics(run)] for run in (config.out, again.out)]
    assert whole[0] == whole[1] and len(whole[0]) == 4
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(config)
    assert (signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers)) == handlers
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_runs_in_this_process(tmp_path: Path) -> None:
    run_workers(1, in_one_process, str(tmp_path))


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("json", "callbacks.on_save=json is no import path: write module:function or FILE.py:function"),
        ("json:nothing", "callbacks.on_save=json:nothing: json has no function nothing"),
        ("none.py:note", "callbacks.on_save: none.py cannot be imported: FileNotFoundError: there is no file none.py"),
    ],
)
def test_callbacks_are_checked_before_the_run(path: str, error: str, tmp_path: Path) -> None:
    config = replace(run_config(tmp_path), callbacks=CallbackConfig(on_save=path))
    with pytest.raises(ValueError) as raised:
        pretrain(read_config(write_recipe(config, tmp_path / "recipe.yaml")))
    assert str(raised.value) == error
    assert asdict(config)["callbacks"]["on_save"] == path
