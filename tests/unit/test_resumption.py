"""A resume with another recipe: every field of every config has its class, and does what that says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from beit3_dist.command_line import to_yaml
from beit3_dist.config import DataConfig, RunConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig, TokenizerDataConfig
from beit3_dist.objectives.masked_data_modeling import NAME, MaskedDataModelingConfig
from beit3_dist.run.folder import keep_config
from beit3_dist.run.resumption import ON_RESUME, OnResume, fields_of, same_recipe
from beit3_dist.run.resumption import on_resume as class_of
from beit3_dist.tasks.config import FinetuneConfig, TaskDataConfig

CONFIGS: dict[str, Any] = {
    "pretraining": RunConfig(
        out="out",
        data=DataConfig(images="a", texts="b", pairs="c"),
        image_tokenizer="i",
        text_tokenizer="t",
        objectives={NAME: MaskedDataModelingConfig()},
    ),
    "fine-tuning": FinetuneConfig(out="out", task="vqa", data=TaskDataConfig(train="a.jsonl"), text_tokenizer="t"),
    "image tokenizer": TokenizerConfig(out="out", data=TokenizerDataConfig(images="a")),
}


def names_in(config: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a config class."""
    for field in fields(config):
        kind = get_type_hints(config)[field.name]
        if field.name == "objectives":
            yield from names_in(MaskedDataModelingConfig, f"objectives.{NAME}.")
        else:
            yield from names_in(kind, f"{prefix}{field.name}.") if is_dataclass(kind) else [f"{prefix}{field.name}"]


ALL = [(kind, name) for kind, config in CONFIGS.items() for name in names_in(type(config))]


def test_every_field_has_its_class_and_every_name_is_a_field() -> None:
    """A new field is put into a class when it is made: this fails until somebody has thought of resuming."""
    assert {name for _, name in ALL if not name.startswith("objectives.")} == set(ON_RESUME)
    assert len(ALL) > 200


def checkpoint_with(kind: str, name: str, folder: Path) -> tuple[Path, Any]:
    """A checkpoint whose recipe has another value of a field, and that value."""
    settings = yaml.safe_load(to_yaml(CONFIGS[kind]))
    *sections, last = name.split(".")
    section = settings
    for part in sections:
        section = section[part]
    value = section[last]
    other = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else f"{value}x"
    section[last] = other
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder, other


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_changed_field_does_what_its_class_says(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, (checkpoint, other) = CONFIGS[kind], checkpoint_with(kind, name, tmp_path)
    change = f"{name}: {other} -> {fields_of(yaml.safe_load(to_yaml(config)))[name]}"
    on_resume = class_of(name)
    if on_resume in (OnResume.FIXED, OnResume.RECIPE):
        with pytest.raises(ValueError) as error:
            same_recipe(config, checkpoint)
        assert change in str(error.value) and "\n" not in str(error.value)
        assert ("--checkpoint.other_recipe true" in str(error.value)) == (on_resume is OnResume.RECIPE)
        assert caplog.messages == []
        return
    same_recipe(config, checkpoint)
    assert caplog.messages == ([] if on_resume is OnResume.FREE else [f"other than in {checkpoint}: {change}"])


def test_all_changes_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With consent, the fields that need it as well."""
    config = CONFIGS["pretraining"]
    settings = yaml.safe_load(to_yaml(config))
    settings["optim"]["lr"], settings["batch"]["pairs"], settings["data"]["workers"] = 0.5, 64, 3
    del settings["guards"]  # of a former version
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"^batch.pairs: 64 -> 2048: not as in .*other_recipe"):
        same_recipe(config, tmp_path)
    consent = RunConfig(**vars(config) | {"checkpoint": type(config.checkpoint)(other_recipe=True)})
    with caplog.at_level(logging.WARNING):
        same_recipe(consent, tmp_path)
    assert caplog.messages == [f"other than in {tmp_path}: batch.pairs: 64 -> 2048; optim.lr: 0.5 -> 0.001"]
    same_recipe(config, None)


def test_the_recipe_of_every_stretch_is_kept(tmp_path: Path) -> None:
    """Also of one behind which the run has gone back: beside its records, as they are moved aside."""
    keep_config(tmp_path, "first", 0)
    keep_config(tmp_path, "second", 12)
    keep_config(tmp_path, "second", 12)
    keep_config(tmp_path, "third", 20)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    stretches = {"config_step_0000000.yaml": "first", "config_step_0000012.yaml": "second"}
    assert found == stretches | {"config_step_0000020.yaml": "third", "config.yaml": "third"}
    keep_config(tmp_path, "fourth", 12)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert sorted(found.values()) == ["first", "fourth", "fourth", "second", "third"]
    assert found["config.yaml"] == found["config_step_0000012.yaml"] == "fourth"
    assert "config_step_0000020.yaml" not in found


@pytest.mark.parametrize("named", ["now", "before"])
def test_the_default_objective_is_the_same_named_or_not(
    named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    explicit = CONFIGS["pretraining"]
    both = {"now": explicit, "before": replace(explicit, objectives={})}
    (tmp_path / "config.yaml").write_text(to_yaml(both["before" if named == "now" else "now"]))
    same_recipe(both[named], tmp_path)
    assert caplog.messages == []
