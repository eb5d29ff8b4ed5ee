"""What the README and docs/architecture.md say exists."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from beit3_dist.config import ModelConfig, RunConfig
from beit3_dist.image_tokenizer.config import TokenizerConfig
from beit3_dist.model import BEiT3, parameter_counts
from beit3_dist.recipe import read_recipe
from beit3_dist.tasks.config import FinetuneConfig

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
CODE_LAYOUT = README.split("## How the code is laid out")[1].split("```")[1]


def field_names(config: Any, prefix: str = "") -> set[str]:
    """Dotted names of all fields of a config class."""
    names = set()
    for field in fields(config):
        kind = get_type_hints(config)[field.name]
        names |= {prefix + field.name} | (field_names(kind, f"{prefix}{field.name}.") if is_dataclass(kind) else set())
    return names


def test_files_that_it_names_exist() -> None:
    files = re.findall(r"(?:launchers|tools|tests|ds_configs)/[\w./-]*\w", README) + [
        "CONTRIBUTING.md",
        "constraints.txt",
    ]
    assert len(files) > 10
    assert not [name for name in files if not (REPOSITORY / name).exists()]


def test_files_that_the_walks_through_the_code_name_exist() -> None:
    """docs/architecture.md names them below the package."""
    walks = (REPOSITORY / "docs" / "architecture.md").read_text()
    named = re.findall(r"`([a-z_]+/[\w./]*)`", walks)
    assert len(named) > 40
    assert not [name for name in named if not (REPOSITORY / "beit3_dist" / name).exists()]
    assert not re.findall(r"`\w+\.py`", walks), "without its folder"


def test_layout_of_the_code_is_the_folders() -> None:
    """Every folder and module that the picture names exists, and each is named; "..." stands for modules that are not.
    Remarks stand in parentheses and before a colon."""
    package, picture = REPOSITORY / "beit3_dist", CODE_LAYOUT.split("ds_configs/")[0]
    assert {*re.findall(r"^  (\w+)\.py ", picture, re.M), "__init__"} == {path.stem for path in package.glob("*.py")}
    described = dict(re.findall(r"^  (\w+/) +(.*?)(?=^  \w|\Z)", picture, re.M | re.S))
    assert described.keys() == folders(package)
    for folder, words in described.items():
        named = {name.strip() for name in re.sub(r"\([^)]*\)", "", words).rpartition(":")[2].split(",")}
        there = {path.stem for path in (package / folder).glob("*.py")} - {"__init__"} | folders(package / folder)
        assert not named - there - {"..."}, f"{folder} in the README names what does not exist"
        assert "..." in named or not there - named, f"{folder} in the README leaves these out"


def folders(path: Path) -> set[str]:
    """Names of the folders with code in a folder."""
    return {f"{file.parent.name}/" for file in path.glob("*/*.py") if not file.parent.is_symlink()}


def test_options_that_it_names_are_fields() -> None:
    known = (
        field_names(RunConfig)
        | field_names(TokenizerConfig)
        | field_names(FinetuneConfig)
        | {"config", "help", "print_config"}
    )
    dotted = set(re.findall(r"--([a-z_]+\.[a-z_.]+[a-z])", README))
    assert dotted and not dotted - known


@pytest.mark.parametrize("recipe", ["demo", "base", "large", "giant"])
def test_parameters_of_the_recipes(recipe: str) -> None:
    row = re.search(rf"\| `{recipe}` \| ([\d.]+)([MB])", README)
    assert row
    model = ModelConfig(**read_recipe(REPOSITORY / f"launchers/recipes/{recipe}.yaml")["model"])
    total = sum(parameter_counts(BEiT3(model, device="meta")).values())
    stated = float(row[1]) * {"M": 1e6, "B": 1e9}[row[2]]
    assert total == pytest.approx(stated, rel=0.03 if recipe == "giant" else 0.005)  # the paper rounds to 1.9B
