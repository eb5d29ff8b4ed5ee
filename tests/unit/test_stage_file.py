"""What a stage file and its command line mean, and what is refused before any stage begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from beit3_dist.run.stage_file import options_of, read_stages


def stage_file(folder: Path, stages: dict[str, object], **recipes: str) -> Path:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    file = folder / "stages.yaml"
    file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return file


def test_stages_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = stage_file(tmp_path, {"b": "one.yaml", "a": "two.yaml"}, one="init_from: x\n", two="steps: 1\n")
    assert list(read_stages(file).items()) == [("b", tmp_path / "one.yaml"), ("a", tmp_path / "two.yaml")]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ({"a": "one.yaml", "b": "one.yaml"}, "one.yaml: a stage's init_from is the stage before it"),
        ({"a": "one.yaml", "b": "three.yaml"}, "three.yaml cannot be read"),
        ({"model": "one.yaml"}, r"stages.model: this is the name of a field"),
        ({"a/b": "one.yaml"}, "a name has only"),
        ({"a": {"recipe": "one.yaml"}}, "is no recipe's file"),
    ],
)
def test_what_is_no_stage_is_refused(tmp_path: Path, stages: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_stages(stage_file(tmp_path, stages, one="init_from: x\n"))


def test_an_option_is_of_all_stages_or_of_the_one_that_it_names() -> None:
    arguments = ["--steps", "3", "--b.optim.lr=1", "--b.steps", "4", "--data.workers=0", "--c.steps", "5"]
    common = ["--steps", "3"]
    assert options_of(["a", "b"], arguments) == {
        "a": [*common, "--data.workers=0", "--c.steps", "5"],
        "b": [*common, "--optim.lr=1", "--steps", "4", "--data.workers=0", "--c.steps", "5"],
    }
