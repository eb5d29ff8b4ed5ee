"""Recipes: YAML files of a run's fields, checked for mistakes that YAML itself lets pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from beit3_dist.opening import MOST_YAML, one_line, read_text

RECIPES = Path(__file__).parent / "launchers" / "recipes"
"""Of the recipes that come with the program."""
NULL = "tag:yaml.org,2002:null"
MERGE = "<<"
"""The key that YAML merges; it may come several times."""
FORMER = {"objective": "objectives.masked_data_modeling"}
"""Sections under the names that former versions gave them, which recipes and run folders still have."""


def shipped_recipes() -> list[str]:
    """The names by which recipes that come with the program are found."""
    files = [*sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("finetune/*.yaml"))]
    return [str(file.relative_to(RECIPES).with_suffix("")) for file in files]


def find_recipe(name: str | Path, folder: Path = Path()) -> Path:
    """The file of this name in a folder, or else the recipe that comes with the program: `base`, `base.yaml`,
    `finetune/vqa_base`, or as it stands in the repository, `launchers/recipes/base.yaml`."""
    path = folder / name
    shipped = RECIPES / f"{str(name).removeprefix('launchers/recipes/').removesuffix('.yaml')}.yaml"
    return shipped if (path.is_dir() or not path.exists()) and shipped.is_file() else path


def current_name(name: str) -> str:
    """A field's name, dotted, as it is today."""
    section, dot, rest = name.partition(".")
    return FORMER.get(section, section) + dot + rest


def current_names(recipe: str) -> str:
    """The text of a recipe with today's names of sections."""
    return re.sub(rf"^({'|'.join(FORMER)}):", lambda found: f"{FORMER[found[1]]}:", recipe, flags=re.MULTILINE)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The fields of a recipe, or of the config.yaml of a run, and of the recipes that it is based on. Raises ValueError
    as `recipe_texts` and `fields_in` do."""
    return fields_in(recipe_texts(path))


def fields_in(texts: list[tuple[Path, str]]) -> dict[str, Any]:
    """The fields of recipes of which each changes the one before.

    Raises ValueError that names the file, and the line where there is one, for what is no readable YAML of fields; for
    a field that is given twice, of which YAML would take the last; and for one without a value, such as a section
    whose lines are all commented out.
    """
    fields: dict[str, Any] = {}
    for one, text in texts:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            own = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ValueError(f"the recipe {one} is no YAML: {_told(error)}") from None
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"the recipe {one} sets no field: it must hold lines such as `steps: 1000`")
        for problem in _problems(root, ""):
            raise ValueError(f"the recipe {one}, {problem}")
        fields = _over(fields, _nested(own))
    return fields


def recipe_texts(path: str | Path) -> list[tuple[Path, str]]:
    """The recipe, after those that it is based on, whose fields it changes: `based_on: FILE`, beside itself or one that
    comes with the program. Each with its text under today's names. Raises ValueError for a file that cannot be read, or
    that is based on itself."""
    texts: list[tuple[Path, str]] = []
    following: Path | None = find_recipe(path)
    while following is not None:
        path = following
        if path.resolve() in [other.resolve() for other, _ in texts]:
            raise ValueError(f"the recipe {path} is based on itself")
        try:
            text = read_text(path, MOST_YAML)
        except OSError as error:
            raise ValueError(f"the recipe {path} cannot be read: {error.strerror or error}") from None
        base = re.search(r"^based_on: *(\S+) *$", text, flags=re.MULTILINE)
        following = find_recipe(base[1], path.parent) if base else None
        # A line that is a comment keeps the numbers of the others.
        texts.insert(0, (path, current_names(text.replace(base[0], f"# {base[0]}") if base else text)))
    return texts


def _over(below: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields over those below, section by section."""
    both = {n: _over(below[n], v) for n, v in fields.items() if isinstance(v, dict) and isinstance(below.get(n), dict)}
    return below | fields | both


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with what stands under a dotted name in its section."""
    for name in [name for name in fields if "." in name]:
        section, _, rest = name.partition(".")
        fields[section] = {**fields.get(section, {}), rest: fields.pop(name)}
    return fields


def read_sections(path: str | Path, *names: str) -> dict[str, Any]:
    """The fields of a recipe with these sections. Raises ValueError as `read_recipe` does, and where one is missing."""
    fields = read_recipe(path)
    if lacking := [name for name in names if not isinstance(fields.get(name), dict)]:
        raise ValueError(f"the recipe {path} has no section {', '.join(lacking)}")
    return fields


def _told(error: BaseException) -> str:
    """What YAML's error says, with the line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return one_line(error) or type(error).__name__


def _problems(node: yaml.Node, name: str, above: tuple[yaml.Node, ...] = ()) -> Iterator[str]:
    """What is wrong with the fields under `name`; a node that an alias puts into itself is seen once."""
    if node in above:
        yield f"line {node.start_mark.line + 1}: {name} holds itself"
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line, written = key.start_mark.line + 1, str(key.value)
            path = f"{name}.{written}" if name else written
            if written in first and written != MERGE:
                yield f"line {line}: {path} is given twice, first in line {first[written]}: leave one of the two"
            first.setdefault(written, line)
            if value.tag == NULL:
                yield f"line {line}: {path} has no value: give it one, or leave the line out to have the default"
            yield from _problems(value, path, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _problems(item, f"{name}[{number}]", (*above, node))
