"""From a recipe and dotted overrides on the command line to a typed config; mistakes to one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from io import StringIO
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

from beit3_dist.launched import rank, take_place
from beit3_dist.leaving import ExitCode, leave_when_asked
from beit3_dist.recipe import read_recipe

Config = TypeVar("Config")


def is_first_process() -> bool:
    """Whether this process speaks for the run; one that no launcher has started always does."""
    return rank() == 0


def one_line(error: BaseException | str) -> str:
    """The error's words in one line."""
    return " ".join(str(error).split())


def refuse(program: str, error: BaseException | str) -> NoReturn:
    """Ends the process for a mistake of the user's; the first process prints the error as one line."""
    if is_first_process():
        print(f"{program}: error: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(ExitCode.MISTAKE)


def begin(program: str) -> None:
    """What every program of launchers/ does first: from here on a signal to go ends the process in order, and `rank`
    is its rank in the run. Variables that no launcher sets like this end the process with one line."""
    leave_when_asked(program)
    try:
        take_place()
    except ValueError as error:
        refuse(program, error)


def log_to_console() -> None:
    """Shows the package's messages (progress of an index, warnings) on standard error, in the first process only."""
    log = logging.getLogger("beit3_dist")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler() if is_first_process() else logging.NullHandler())


class _Recipe(ActionConfigFile):
    """--config FILE: checks the file as a whole, then its fields, and names it in what is wrong."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        for name, value in read_recipe(values).items():
            if name in parser.groups and not isinstance(value, dict):
                raise ValueError(f"the recipe {values}: {name} is a section of fields, not {value!r}")
        try:
            super().__call__(parser, cfg, values, option_string)
            parser.validate(cfg, skip_required=True)  # what the command line has given so far is known to be right
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            raise ValueError(f"the recipe {values}: {error}") from None


def parse(config_class: Callable[..., Config], program: str, description: str, arguments: Sequence[str]) -> Config:
    """The config that `--config RECIPE.yaml` and `--a.b VALUE` describe.

    `config_class` is a (nested) dataclass whose docstrings become the help. Unknown keys, wrong types and what its
    `__post_init__` refuses end the process through `refuse`. `--print_config` prints the resolved config.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program,
        description=description,
        exit_on_error=False,
        usage=f"{program} --config RECIPE.yaml [--field VALUE ...] [--print_config] [--help]",
    )
    parser.add_argument("--config", action=_Recipe, help="recipe: a YAML file with any of the fields below")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=SUPPRESS, help=SUPPRESS)  # set by launchers
    parser.add_class_arguments(config_class)
    # Under a launcher every process parses; the first one's --help and --print_config are enough.
    terminal = nullcontext() if is_first_process() else redirect_stdout(StringIO())
    try:
        with terminal:
            values = parser.instantiate(parser.parse_args(list(arguments)))
        fields = {name: value for name, value in vars(values).items() if name not in ("config", "local_rank")}
        return config_class(**fields)
    except (ArgumentError, ValueError, TypeError) as error:
        refuse(program, error)


def to_yaml(config: Any) -> str:
    """The resolved config as a recipe."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
