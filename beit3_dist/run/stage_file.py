"""Stage files: recipes that are run one after the other, each from the weights of the one before.

    stages:
      images: vlmo_base_images.yaml
      texts: vlmo_base_texts.yaml
      pairs: vlmo_base.yaml

A line names a stage and its recipe, beside the file or one that comes with the program; one with a `task` is a
fine-tuning. Every stage is a run of its own in OUT/NAME.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from beit3_dist.command_line import parse, refusing
from beit3_dist.config import RunConfig, require
from beit3_dist.objectives import SECTIONS
from beit3_dist.recipe import find_recipe, read_recipe, read_sections
from beit3_dist.tasks.config import FinetuneConfig


@dataclass(frozen=True)
class Stage:
    """One of the runs."""

    name: str
    config: RunConfig | FinetuneConfig


def read_stages(path: Path) -> dict[str, Path]:
    """Name -> recipe of the stages of a file, in their order. Raises ValueError as `read_recipe` does, and for a stage
    that is none."""
    path, recipes = find_recipe(path), dict[str, Path]()
    own = {field.name for kind in (RunConfig, FinetuneConfig) for field in fields(kind)}
    for name, recipe in read_sections(path, "stages")["stages"].items():
        stage = f"{path}, stages.{name}"
        require(bool(re.fullmatch(r"[a-z0-9_-]+", str(name))), f"{stage}: a name has only a to z, 0 to 9, _ and -")
        require(name not in own, f"{stage}: this is the name of a field: choose another one")
        require(isinstance(recipe, str), f"{stage}: {recipe!r} is no recipe's file")
        file = find_recipe(recipe, path.parent)
        require(
            not recipes or "init_from" not in read_recipe(file),
            f"{file}: a stage's init_from is the stage before it: leave it out",
        )
        recipes[name] = file
    return recipes


def options_of(names: Sequence[str], arguments: Sequence[str]) -> dict[str, list[str]]:
    """Stage -> the arguments for its run: `--NAME.a.b VALUE` is for that one, `--a.b VALUE` for all."""
    options: dict[str, list[str]] = {name: [] for name in names}
    meant: Sequence[str] = names
    for argument in arguments:
        if argument.startswith("--"):
            first, dot, rest = argument[2:].partition(".")
            of_one = bool(dot) and first in options
            meant, argument = ([first], f"--{rest}") if of_one else (names, argument)
        for name in meant:
            options[name].append(argument)
    return options


def stages_of(program: str, description: str, arguments: Sequence[str]) -> tuple[list[Stage], bool]:
    """The stages that `--config STAGES.yaml --out OUT` and further options describe, each with the run before it as its
    `init_from`; and whether they are only to be checked. What is wrong ends the process, see `command_line.parse`."""
    parser = ArgumentParser(
        program, description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="stage file: `stages:`, then lines NAME: RECIPE")
    parser.add_argument("--out", type=Path, required=True, help="folder of the stages' run folders")
    parser.add_argument("--dry-run", action="store_true", help="only check all stages")
    own, rest = parser.parse_known_args(arguments)
    stages: list[Stage] = []
    with refusing(program):
        recipes = read_stages(own.config)
    for name, options in options_of(list(recipes), rest).items():
        before = ["--init_from", stages[-1].config.out] if stages else []
        fields = ["--config", str(recipes[name]), *options, "--out", str(own.out / name), *before]
        stages.append(Stage(name, _config_of(recipes[name], f"{program}: stage {name}", fields)))
    return stages, own.dry_run


def _config_of(recipe: Path, program: str, arguments: list[str]) -> RunConfig | FinetuneConfig:
    if "task" in read_recipe(recipe):
        return parse(FinetuneConfig, program, "", arguments)
    return parse(RunConfig, program, "", arguments, SECTIONS)
