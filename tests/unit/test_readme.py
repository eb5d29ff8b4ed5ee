"""What the README says exists."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from beit3_dist.config import ModelConfig, RunConfig
from beit3_dist.model import BEiT3, parameter_counts
from beit3_dist.tasks.config import FinetuneConfig
from beit3_dist.training.tokenizer_config import TokenizerConfig

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


def test_layout_of_the_code_is_the_folders() -> None:
    """Every module that the picture names exists, and every folder of the package is in the picture."""
    described = {}
    for line in CODE_LAYOUT.splitlines():
        if match := re.match(r"  (\w+)/ +", line):
            folder = match[1]
            described[folder] = ""
        if described:
            described[folder] = described.get(folder, "") + line
        if line.startswith("ds_configs"):
            break
    folders = {p.name for p in (REPOSITORY / "beit3_dist").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert described.keys() == folders
    for folder, words in described.items():
        for module in (REPOSITORY / "beit3_dist" / folder).glob("*.py"):
            if folder in ("parallel", "checkpoint", "objectives") and module.stem != "__init__":
                assert module.stem in words or module.stem in ("deepspeed_config", "files"), (
                    f"{module} is not in the README"
                )


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
    model = ModelConfig(**yaml.safe_load((REPOSITORY / f"launchers/recipes/{recipe}.yaml").read_text())["model"])
    total = sum(parameter_counts(BEiT3(model, device="meta")).values())
    stated = float(row[1]) * {"M": 1e6, "B": 1e9}[row[2]]
    assert total == pytest.approx(stated, rel=0.03 if recipe == "giant" else 0.005)  # the paper rounds to 1.9B
